# First of two steps, at 192 pixels: ViL's configuration lstm_6M16_e800_..._res192_bias.
_base_ = [
    '../_base_/models/classifier_vil.py',
    '../_base_/datasets/imagenet_3aug_192.py',
    '../_base_/schedules/imagenet_vil_800e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(img_size=192),
    head=dict(in_channels=2 * 192),  # first and last token, one after the other
)
