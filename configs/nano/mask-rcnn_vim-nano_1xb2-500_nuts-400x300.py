_base_ = [
    '../_base_/models/mask-rcnn_nano.py',
    '../_base_/datasets/nuts_instance.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_det.py',
]
num_classes = 3
model = dict(
    backbone=dict(
        type='visionseq_mm.Vim',
        arch=dict(embed_dims=96, depth=6),  # half of Vim-Ti's width, a quarter of its depth
        img_size=(300, 400),
        out_indices=-1,
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter',
        in_channels=96,
        out_channels=_base_.channels,
        num_outs=5,
    ),
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)
    ),
)
train_cfg = dict(max_iters=500, val_interval=500)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=500),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=2)
