# 160k iterations with linear warm-up and decay, as mmseg trains Swin. The decay counts from the
# first iteration, so that max_iters may be any number.
_base_ = './adamw.py'
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
optim_wrapper = dict(optimizer=dict(lr=6e-5, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
