_base_ = './upernet_secvit-tiny.py'
model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.15, init_cfg=dict(checkpoint='visionseq://secvit-small')
    )
)
