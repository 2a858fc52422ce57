_base_ = '../vim/mask-rcnn_vim-tiny_sfp_1x_coco-1024x1024.py'
data_root = '{{$NUTS_ROOT:data/nuts}}'
classes = ('date', 'fig', 'hazelnut')
num_classes = len(classes)
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes))
)
dataset = dict(
    data_root=data_root,
    ann_file='trainval.json',
    data_prefix=dict(img='images/'),
    metainfo=dict(classes=classes),
)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/trainval.json')
test_evaluator = val_evaluator
# Few images: an epoch has 9 iterations, so the pace of 1x, ten times slower.
train_cfg = dict(max_epochs=120, val_interval=10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=True, milestones=[80, 110], gamma=0.1),
]
