_base_ = [
    '../_base_/models/retinanet.py',
    '../_base_/datasets/nuts_instance.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_det.py',
]
dims = [32, 64, 96, 128]  # half of SecViT-T's and less, with heads of 16 channels
channels = 64  # a quarter of mmdet's, and half its convolutions: this runs on a CPU
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
    neck=dict(
        type='FPN',
        in_channels=dims,
        out_channels=channels,
        start_level=1,
        add_extra_convs='on_input',
        num_outs=5,
    ),
    bbox_head=dict(in_channels=channels, feat_channels=channels, stacked_convs=2, num_classes=3),
)
train_cfg = dict(max_iters=500, val_interval=500)
val_evaluator = dict(metric='bbox')  # the masks of the data are not used
test_evaluator = val_evaluator
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=500),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=2)
