_base_ = './upernet_deit-tiny.py'
dims = 384
model = dict(
    backbone=dict(
        arch='deit-small',
        init_cfg=dict(
            checkpoint='https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
        ),
    ),
    neck=dict(in_channels=[dims] * 4),
    decode_head=dict(in_channels=[dims] * 4, channels=dims),
    auxiliary_head=dict(in_channels=dims),
)
