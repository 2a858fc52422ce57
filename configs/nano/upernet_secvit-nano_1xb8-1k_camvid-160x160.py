_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_seg.py',
]
crop_size = (160, 160)
num_classes = 11
dims = (32, 64, 96, 128)  # half of SecViT-T's and less, with heads of 16 channels
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='visionseq_mm.SecViT',
        arch=dict(
            embed_dims=dims,
            depths=(1, 1, 2, 1),
            num_heads=(2, 4, 6, 8),
            layer_scale=(False, False, False, False),
        ),
    ),
    decode_head=dict(in_channels=dims, channels=64, num_classes=num_classes),
    auxiliary_head=dict(in_channels=dims[2], channels=64, num_classes=num_classes),
)
default_hooks = dict(checkpoint=dict(interval=1000))
