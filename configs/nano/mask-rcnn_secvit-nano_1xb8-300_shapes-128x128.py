_base_ = [
    '../_base_/models/mask-rcnn_nano.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_det.py',
]
num_classes = 4
dims = [32, 64, 96, 128]  # half of SecViT-T's and less, with heads of 16 channels
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
    neck=dict(type='FPN', in_channels=dims, out_channels=_base_.channels, num_outs=5),
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)
    ),
    # Half of nano's proposals and samples, which is what so small a picture needs.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
train_cfg = dict(max_iters=300, val_interval=300)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=300),
)
log_processor = dict(by_epoch=False)
