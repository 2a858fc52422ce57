# Half of the 800 epochs, for vil2-tiny-e400.
_base_ = './vil2-tiny_16xb128-800e_in1k-192px.py'
train_cfg = dict(max_epochs=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=400, convert_to_iter_based=True),
]
