_base_ = './upernet_secvit-tiny.py'
dims = [80, 160, 320, 512]
model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.4, init_cfg=dict(checkpoint='visionseq://secvit-base')
    ),
    decode_head=dict(in_channels=dims),
    auxiliary_head=dict(in_channels=dims[2]),
)
