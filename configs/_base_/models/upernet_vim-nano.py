# UperNet on a Vim of half of Vim-Ti's width and a quarter of its depth, with narrow heads: this
# runs on a CPU. Sizes and classes come from the child.
_base_ = './upernet.py'
dims = 96
model = dict(
    backbone=dict(type='visionseq_mm.Vim', arch=dict(embed_dims=dims, depth=6)),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter', in_channels=[dims] * 4, norm_cfg=_base_.norm_cfg
    ),
    decode_head=dict(in_channels=[dims] * 4, channels=64),
    auxiliary_head=dict(in_channels=dims, channels=64),
)
