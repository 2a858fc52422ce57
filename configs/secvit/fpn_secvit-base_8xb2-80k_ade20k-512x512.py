_base_ = './fpn_secvit-tiny_8xb2-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.4, init_cfg=dict(checkpoint='visionseq://secvit-base')
    ),
    neck=dict(in_channels=[80, 160, 320, 512]),
)
