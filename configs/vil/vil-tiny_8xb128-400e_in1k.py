# Half of the epochs, batch and rate: ViL's configuration v1/pretrain/lstm_6M16_e400.
_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_3aug_224.py',
    '../_base_/schedules/imagenet_vil_400e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(type='visionseq_mm.ViL', arch='tiny', version=1, out_type='cls'),
    head=dict(in_channels=192, loss=dict(_delete_=True, type='CrossEntropyLoss', use_soft=True)),
)
