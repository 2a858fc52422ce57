# Long-sequence fine-tuning, ViL's configuration longseq/vil: patches overlap by half, 729 tokens
# instead of 196; a small rate, constant after the warm-up.
_base_ = [
    '../_base_/models/classifier_vil.py',
    '../_base_/datasets/imagenet_3aug_224.py',
    '../_base_/schedules/imagenet_ft_30e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(backbone=dict(arch='tinyplus', version=1, stride=8), head=dict(in_channels=192))
load_from = 'visionseq://vil-tinyplus/cls'
param_scheduler = [dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True)]
