_base_ = [
    '../_base_/models/upernet_vil-tiny.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/vil_160k.py',
    '../_base_/default_runtime_seg.py',
]
crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
)
