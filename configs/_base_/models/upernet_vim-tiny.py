# UperNet on Vim-Ti as its code has it: the outputs of the mixers, not the residual stream; the
# adapter of BEiT; a head as wide as the backbone; the drop path that its model has by default.
_base_ = './upernet.py'
dims = 192
model = dict(
    backbone=dict(
        type='visionseq_mm.Vim',
        arch='tiny',
        feature='branch',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://vim-tiny'),
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter', in_channels=[dims] * 4, norm_cfg=_base_.norm_cfg
    ),
    decode_head=dict(in_channels=[dims] * 4, channels=dims),
    auxiliary_head=dict(in_channels=dims),
)
