_base_ = './cascade-mask-rcnn_vil-tiny_sfp_8xb8-lsj-100e_coco-1024x1024.py'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='visionseq://vil2-base')),
    neck=dict(in_channels=768),
)
# A layer is a pair of blocks here: Vim-B's 0.7, squared.
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.49))
