_base_ = './fpn_secvit-tiny_8xb2-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.5, init_cfg=dict(checkpoint='visionseq://secvit-large')
    ),
    neck=dict(in_channels=[112, 224, 448, 640]),
)
