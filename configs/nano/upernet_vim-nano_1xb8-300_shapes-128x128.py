_base_ = [
    '../_base_/models/upernet_vim-nano.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/adamw_iters.py',
    '../_base_/default_runtime_seg.py',
]
crop_size = (128, 128)
num_classes = 5
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
)
train_cfg = dict(max_iters=300, val_interval=300)
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # twice the schedule's: few iterations, from scratch
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
