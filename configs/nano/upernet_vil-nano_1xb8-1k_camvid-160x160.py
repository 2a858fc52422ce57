_base_ = './upernet_vim-nano_1xb8-1k_camvid-160x160.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='visionseq_mm.ViL',
        arch=dict(embed_dims=96, depth=4),  # half of ViL-T's width, a third of its depth
        img_size=(160, 160),
    ),
)
