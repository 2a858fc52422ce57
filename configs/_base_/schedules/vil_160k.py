# 160k iterations as ViL trains UperNet (its configuration vil_t16_upernet160k_dim192).
_base_ = './adamw_160k.py'
optim_wrapper = dict(
    optimizer=dict(lr=5e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.65),  # for each pair of blocks
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=False),  # 1e-6 of 5e-4
]
