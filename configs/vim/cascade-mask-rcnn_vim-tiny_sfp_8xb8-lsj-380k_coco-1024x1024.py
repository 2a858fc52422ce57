# The length of Vim's paper, appendix B: 380k iterations with a linear decay, where the released
# code has 184k with two steps. The paper leaves the rest to ViTDet, as the code does.
_base_ = './cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e_coco-1024x1024.py'
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=380000, val_interval=20000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False),
]
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=20000))
log_processor = dict(by_epoch=False)
