_base_ = [
    '../_base_/models/upernet_vim-nano.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_seg.py',
]
crop_size = (160, 160)
num_classes = 11
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # twice the schedule's: few iterations, from scratch
default_hooks = dict(checkpoint=dict(interval=1000))
