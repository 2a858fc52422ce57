_base_ = './upernet_secvit-tiny.py'
dims = [112, 224, 448, 640]
model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.5, init_cfg=dict(checkpoint='visionseq://secvit-large')
    ),
    decode_head=dict(in_channels=dims),
    auxiliary_head=dict(in_channels=dims[2]),
)
