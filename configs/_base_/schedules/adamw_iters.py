# For small models from scratch: AdamW, warm-up, linear decay to zero, counted in iterations; the
# child sets max_iters. Rate and clipping were found by trying; the decay of the weights is that of
# the Vim-S, ViL and SecViT papers.
_base_ = './adamw.py'
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=1000)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, by_epoch=False),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
