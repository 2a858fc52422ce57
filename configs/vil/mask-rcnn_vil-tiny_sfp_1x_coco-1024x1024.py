# ViL was never published on COCO: Vim's recipe, which fits a backbone of the same form.
_base_ = '../vim/mask-rcnn_vim-tiny_sfp_1x_coco-1024x1024.py'
model = dict(
    backbone=dict(type='visionseq_mm.ViL', init_cfg=dict(checkpoint='visionseq://vil2-tiny'))
)
# A layer is a pair of blocks here: Vim's 0.837, squared.
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
