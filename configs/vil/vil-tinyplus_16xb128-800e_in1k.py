_base_ = './vil-tiny_16xb128-800e_in1k.py'
model = dict(backbone=dict(arch='tinyplus'))
