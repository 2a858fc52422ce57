# As imagenet_vil_400e.py, for 2048 pictures and twice as long.
_base_ = './imagenet_vil_400e.py'
train_cfg = dict(max_epochs=800)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=800, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
