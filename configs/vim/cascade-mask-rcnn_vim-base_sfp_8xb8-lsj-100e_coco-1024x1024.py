# The decay by layers is that of vimdet_b in its detection code.
_base_ = './cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e_coco-1024x1024.py'
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='visionseq://vim-base')),
    neck=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
