# The released script pt-vim-t.sh, but for mixed precision: it trains in float32.
_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(type='visionseq_mm.Vim', arch='tiny', out_type='cls'),
    head=dict(in_channels=192),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
default_hooks = dict(ema=dict(type='EMAHook', momentum=4e-5, evaluate_on_origin=True))
