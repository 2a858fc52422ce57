_base_ = './cascade-mask-rcnn_deit-tiny_sfp_8xb8-lsj-100e_coco-1024x1024.py'
model = dict(
    backbone=dict(
        arch='deit-small',
        init_cfg=dict(
            checkpoint='https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
        ),
    ),
    neck=dict(in_channels=384),
)
