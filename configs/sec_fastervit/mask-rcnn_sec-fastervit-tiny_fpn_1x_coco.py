# The schedule is mmdet's for Swin-T; outputs through BN as in FasterViT's detectors.
_base_ = [
    '../_base_/models/mask-rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        type='visionseq_mm.SECFasterViT',
        arch='tiny',
        out_norm=dict(type='BN'),
        drop_path_rate=0.2,
        recompute='kernel',
    ),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, milestones=[8, 11], gamma=0.1),
]
sync_bn = 'torch'  # two or four images per GPU are few for batch statistics
