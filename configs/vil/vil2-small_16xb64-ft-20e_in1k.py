_base_ = './vil2-tiny_16xb64-ft-20e_in1k.py'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.05, drop_path_decay=False),
    head=dict(in_channels=2 * 384),
)
load_from = 'work_dirs/vil2-small_16xb128-400e_in1k-192px/epoch_400.pth'
