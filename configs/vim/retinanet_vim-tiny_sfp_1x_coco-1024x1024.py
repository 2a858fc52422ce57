# No published run: backbone and optimiser as in Vim's Cascade Mask R-CNN, whose rate is for
# batches of 64, at the pace of mmdet's 1x schedule and its batches of 16.
_base_ = [
    '../_base_/models/retinanet_sfp.py',
    '../_base_/datasets/coco_detection_1024x1024.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        type='visionseq_mm.Vim',
        arch='tiny',
        img_size=1024,
        out_indices=-1,
        drop_path_rate=0.1,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://vim-tiny'),
    ),
    neck=dict(in_channels=192),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.837),
)
