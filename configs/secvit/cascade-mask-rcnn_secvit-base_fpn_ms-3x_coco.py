_base_ = './cascade-mask-rcnn_secvit-tiny_fpn_ms-3x_coco.py'
model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.4, init_cfg=dict(checkpoint='visionseq://secvit-base')
    ),
    neck=dict(in_channels=[80, 160, 320, 512]),
)
