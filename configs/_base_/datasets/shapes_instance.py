# Coloured shapes on textured ground, 128x128, drawn by tools/demo.py; COCO format.
data_root = '{{$SHAPES_ROOT:work_dirs/demo/data}}'
metainfo = dict(
    classes=('disc', 'square', 'triangle', 'star'),
    palette=[(255, 128, 0), (0, 255, 0), (0, 128, 255), (255, 0, 255)],
)
scale = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
dataset = dict(
    type='visionseq_mm.CocoDataset',
    data_root=data_root,
    metainfo=metainfo,
)
# Pictures this small are read between two iterations, without worker processes.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        ann_file='train.json',
        data_prefix=dict(img='images/train'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='val.json',
        data_prefix=dict(img='images/val'),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + '/val.json',
    metric=['bbox', 'segm'],
)
test_evaluator = val_evaluator
