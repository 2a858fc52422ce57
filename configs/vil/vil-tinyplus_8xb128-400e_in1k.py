_base_ = './vil-tiny_8xb128-400e_in1k.py'
model = dict(backbone=dict(arch='tinyplus'))
