# ViL's configuration vil_b16_upernet160k_dim384.
_base_ = [
    '../_base_/models/upernet_vil-base.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/vil_160k.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(img_size=_base_.crop_size),
)
