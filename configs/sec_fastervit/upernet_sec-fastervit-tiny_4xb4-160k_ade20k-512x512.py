# The schedule is mmseg's for Swin-T; outputs through BN as in FasterViT's detectors.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
dims = [64, 128, 256, 512]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='visionseq_mm.SECFasterViT',
        arch='tiny',
        out_norm=dict(type='BN'),
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=dims, channels=512),
    auxiliary_head=dict(in_channels=dims[2]),
)
sync_bn = 'torch'  # two or four images per GPU are few for batch statistics
