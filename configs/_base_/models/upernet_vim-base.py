# No published run: as on Vim-S, with the head that mmseg gives a ViT-B.
_base_ = './upernet_vim-small.py'
dims = 768
model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='visionseq://vim-base')),
    neck=dict(in_channels=[dims] * 4),
    decode_head=dict(in_channels=[dims] * 4, channels=512),
    auxiliary_head=dict(in_channels=dims),
)
