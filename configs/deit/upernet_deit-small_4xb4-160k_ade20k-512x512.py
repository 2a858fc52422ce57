# Vim's comparison at 512 pixels, where all blocks attend to all of the image, with Vim's recipe.
_base_ = [
    '../_base_/models/upernet_deit-small.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(img_size=512, window_size=0),
)
