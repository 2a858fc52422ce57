_base_ = './cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e_coco-1024x1024.py'
model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='visionseq://vim-small')),
    neck=dict(in_channels=384),
)
