_base_ = './mask-rcnn_vil-tiny_sfp_1x_coco-1024x1024.py'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='visionseq://vil2-small')),
    neck=dict(in_channels=384),
)
