# ViTDet's windows at 1024 pixels, beside our configs of that size: the same recipe.
_base_ = [
    '../_base_/models/upernet_deit-tiny.py',
    '../_base_/datasets/ade20k_1024x1024.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(img_size=1024),
)
