# Half of the epochs, batch and rate: ViL's configuration v1/pretrain/lstm_6M16_e400.
_base_ = [
    '../_base_/models/classifier_vil.py',
    '../_base_/datasets/imagenet_3aug_224.py',
    '../_base_/schedules/imagenet_vil_400e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(backbone=dict(version=1), head=dict(in_channels=192))
