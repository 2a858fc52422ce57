# Long-sequence fine-tuning, the released script ft-vim-t.sh: patches overlap by half, 729 tokens
# instead of 196. The script's own start shifts half of the position table by one row, which this
# does not.
_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_ft_30e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(type='visionseq_mm.Vim', arch='tiny', stride=8, out_type='cls'),
    head=dict(in_channels=192),
)
load_from = 'visionseq://vim-tiny/cls'
default_hooks = dict(ema=dict(type='EMAHook', momentum=4e-5, evaluate_on_origin=True))
