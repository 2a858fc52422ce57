_base_ = './fpn_secvit-tiny_8xb2-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.15, init_cfg=dict(checkpoint='visionseq://secvit-small')
    ),
)
