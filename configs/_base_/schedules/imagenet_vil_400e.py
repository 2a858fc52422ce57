# 400 epochs as ViL trains: 1e-3 for 1024 pictures, clipped gradients, warm-up from zero, cosine.
_base_ = './adamw.py'
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=400, val_interval=10)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=400, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
