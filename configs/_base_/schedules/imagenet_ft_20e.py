# ViL's second step: 20 epochs at a small rate, nothing clipped.
_base_ = './adamw.py'
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=20, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=20, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
