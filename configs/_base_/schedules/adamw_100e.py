# ViTDet's 100 epochs for large-scale jitter: steps at 88.9 % and 96.3 %, warm-up of 250
# iterations.
_base_ = './adamw_1x.py'
train_cfg = dict(max_epochs=100, val_interval=10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=True, milestones=[89, 96], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=64)
