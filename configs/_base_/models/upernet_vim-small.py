# UperNet on Vim-S as its code has it: the residual stream.
_base_ = './upernet_vim-tiny.py'
dims = 384
model = dict(
    backbone=dict(
        arch='small', feature='stream', init_cfg=dict(checkpoint='visionseq://vim-small')
    ),
    neck=dict(in_channels=[dims] * 4),
    decode_head=dict(in_channels=[dims] * 4, channels=dims),
    auxiliary_head=dict(in_channels=dims),
)
