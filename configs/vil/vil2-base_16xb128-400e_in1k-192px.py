_base_ = './vil2-tiny_16xb128-400e_in1k-192px.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2, drop_path_decay=False),
    head=dict(in_channels=2 * 768),
)
