_base_ = './vil-tinyplus-stride8_8xb128-ft-30e_in1k.py'
model = dict(
    backbone=dict(arch='smallplus', drop_path_rate=0.05, drop_path_decay=False),
    head=dict(in_channels=384),
)
load_from = 'visionseq://vil-smallplus/cls'
