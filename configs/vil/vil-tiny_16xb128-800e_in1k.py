# Version 1 trains at 224 pixels at once: ViL's configuration v1/pretrain/lstm_6M16_e800.
_base_ = [
    '../_base_/models/classifier_vil.py',
    '../_base_/datasets/imagenet_3aug_224.py',
    '../_base_/schedules/imagenet_vil_800e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(backbone=dict(version=1), head=dict(in_channels=192))
