_base_ = './cascade-mask-rcnn_secvit-tiny_fpn_ms-3x_coco.py'
model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.5, init_cfg=dict(checkpoint='visionseq://secvit-large')
    ),
    neck=dict(in_channels=[112, 224, 448, 640]),
)
