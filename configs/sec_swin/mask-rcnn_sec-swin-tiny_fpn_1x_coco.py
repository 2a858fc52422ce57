# As mmdet trains Swin-T: the schedule, drop path and normalised outputs.
_base_ = [
    '../_base_/models/mask-rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        type='visionseq_mm.SECSwin',
        arch='tiny',
        out_norm=dict(type='visionseq_mm.LN2d', eps=1e-5),
        drop_path_rate=0.2,
        recompute='kernel',
    ),
    neck=dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, milestones=[8, 11], gamma=0.1),
]
