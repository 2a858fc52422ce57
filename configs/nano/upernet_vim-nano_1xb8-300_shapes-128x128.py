_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_seg.py',
]
crop_size = (128, 128)
num_classes = 5
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
train_cfg = dict(max_iters=300, val_interval=300)
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # twice the schedule's: few iterations, from scratch
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
