# UperNet on ViL-S as its code has it.
_base_ = './upernet_vil-tiny.py'
dims = 384
model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.05, init_cfg=dict(checkpoint='visionseq://vil2-small')
    ),
    neck=dict(in_channels=[dims] * 4),
    decode_head=dict(in_channels=[dims] * 4, channels=dims),
    auxiliary_head=dict(in_channels=dims, channels=dims),
)
