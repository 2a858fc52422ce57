# UperNet on ViL as its code has it: the adapter of BEiT, heads as wide as the backbone, no
# dropout, and the outputs of these four pairs of blocks.
_base_ = './upernet.py'
dims = 192
model = dict(
    backbone=dict(
        type='visionseq_mm.ViL',
        arch='tiny',
        out_indices=(3, 5, 7, 11),
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://vil2-tiny'),
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter', in_channels=[dims] * 4, norm_cfg=_base_.norm_cfg
    ),
    decode_head=dict(in_channels=[dims] * 4, channels=dims, dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=dims, channels=dims, dropout_ratio=0.0),
)
