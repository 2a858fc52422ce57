_base_ = [
    '../_base_/models/cascade-mask-rcnn.py',
    '../_base_/datasets/nuts_instance.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_det.py',
]
num_classes = 3
# A quarter of mmdet's width and about a quarter of its proposals and samples: this runs on a CPU.
channels = 64
num_proposals = 200
num_samples = 64
model = dict(
    backbone=dict(
        type='visionseq_mm.ViL',
        arch=dict(embed_dims=96, depth=4),  # half of ViL-T's width, a third of its depth
        img_size=(300, 400),
        out_indices=-1,
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter',
        in_channels=96,
        out_channels=channels,
        num_outs=5,
    ),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        # Lists do not merge: the base's three stages, each with its own changes.
        bbox_head=[
            dict(head, in_channels=channels, fc_out_channels=256, num_classes=num_classes)
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(
            in_channels=channels,
            conv_out_channels=channels,
            num_convs=2,
            num_classes=num_classes,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=num_proposals),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=num_samples))
            for stage in _base_.model.train_cfg.rcnn
        ],
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=num_proposals)),
)
train_cfg = dict(max_iters=500, val_interval=500)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=500),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=2)
