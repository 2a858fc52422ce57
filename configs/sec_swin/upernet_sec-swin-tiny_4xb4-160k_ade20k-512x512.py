# As mmseg trains Swin-T: the schedule, drop path and normalised outputs.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
dims = [96, 192, 384, 768]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='visionseq_mm.SECSwin',
        arch='tiny',
        out_norm=dict(type='visionseq_mm.LN2d', eps=1e-5),
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=dims, channels=512),
    auxiliary_head=dict(in_channels=dims[2]),
)
