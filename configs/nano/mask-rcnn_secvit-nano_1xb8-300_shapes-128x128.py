_base_ = [
    '../_base_/models/mask-rcnn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_det.py',
]
num_classes = 4
dims = [32, 64, 96, 128]  # half of SecViT-T's and less, with heads of 16 channels
# A quarter of mmdet's width, and of its proposals and samples what so small a picture needs.
channels = 64
num_proposals = 100
num_samples = 32
model = dict(
    backbone=dict(
        type='visionseq_mm.SecViT',
        arch=dict(
            embed_dims=dims,
            depths=(1, 1, 2, 1),
            num_heads=(2, 4, 6, 8),
            layer_scale=(False, False, False, False),
        ),
    ),
    neck=dict(type='FPN', in_channels=dims, out_channels=channels, num_outs=5),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(
            in_channels=channels,
            conv_out_channels=channels,
            num_convs=2,
            num_classes=num_classes,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=num_proposals),
        rcnn=dict(sampler=dict(num=num_samples)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=num_proposals)),
)
train_cfg = dict(max_iters=300, val_interval=300)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=300),
)
log_processor = dict(by_epoch=False)
