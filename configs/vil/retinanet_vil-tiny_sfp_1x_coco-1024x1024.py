# ViL was never published on COCO: Vim's recipe, which fits a backbone of the same form.
_base_ = [
    '../_base_/models/retinanet.py',
    '../_base_/datasets/coco_detection_1024x1024.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),  # always the grid it was tuned for
    backbone=dict(
        type='visionseq_mm.ViL',
        arch='tiny',
        img_size=1024,
        out_indices=-1,
        drop_path_rate=0.1,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://vil2-tiny'),
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter',
        in_channels=192,
        out_channels=256,
        scales=(2, 1, 0.5),  # strides 8, 16 and 32; 64 and 128 are pooled
        num_outs=5,
    ),
)
optim_wrapper = dict(
    constructor='visionseq_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.837),
)
