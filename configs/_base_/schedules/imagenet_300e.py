# 300 epochs of DeiT's main.py, from which Vim's and SecViT's come: five epochs of warm-up from
# 1e-6, cosine to 1e-5. Here the rate changes with every iteration, there with every epoch.
_base_ = './adamw.py'
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, end=300, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
