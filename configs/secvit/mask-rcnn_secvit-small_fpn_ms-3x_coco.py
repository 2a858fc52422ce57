_base_ = './mask-rcnn_secvit-tiny_fpn_ms-3x_coco.py'
model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.15, init_cfg=dict(checkpoint='visionseq://secvit-small')
    ),
)
