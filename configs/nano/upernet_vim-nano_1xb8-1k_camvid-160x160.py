_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_seg.py',
]
crop_size = (160, 160)
num_classes = 11
dims = 96  # half of Vim-Ti's, a quarter of its depth
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='visionseq_mm.Vim',
        arch=dict(embed_dims=dims, depth=6),
        img_size=crop_size,
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter',
        in_channels=[dims] * 4,
        norm_cfg=_base_.norm_cfg,
    ),
    decode_head=dict(in_channels=[dims] * 4, channels=64, num_classes=num_classes),
    auxiliary_head=dict(in_channels=dims, channels=64, num_classes=num_classes),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # twice the schedule's: few iterations, from scratch
default_hooks = dict(checkpoint=dict(interval=1000))
