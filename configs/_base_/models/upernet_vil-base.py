# UperNet on ViL-B as its code has it, with the heads of ViL-S.
_base_ = './upernet_vil-small.py'
dims = 768
model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.1, init_cfg=dict(checkpoint='visionseq://vil2-base')
    ),
    neck=dict(in_channels=[dims] * 4),
    decode_head=dict(in_channels=[dims] * 4),
    auxiliary_head=dict(in_channels=dims),
)
