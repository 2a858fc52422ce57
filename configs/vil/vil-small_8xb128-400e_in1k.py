_base_ = './vil-tiny_8xb128-400e_in1k.py'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.05, drop_path_decay=False),
    head=dict(in_channels=384),
)
