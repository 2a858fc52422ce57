_base_ = './mask-rcnn_vim-tiny_sfp_1x_coco-1024x1024.py'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='visionseq://vim-small')),
    neck=dict(in_channels=384),
)
