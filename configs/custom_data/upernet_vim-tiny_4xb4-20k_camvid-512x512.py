_base_ = '../vim/upernet_vim-tiny_4xb4-160k_ade20k-512x512.py'
data_root = '{{$CAMVID_ROOT:data/camvid}}'
classes = (
    'sky',
    'building',
    'pole',
    'road',
    'pavement',
    'tree',
    'sign symbol',
    'fence',
    'car',
    'pedestrian',
    'bicyclist',
)
num_classes = len(classes)
model = dict(
    decode_head=dict(num_classes=num_classes), auxiliary_head=dict(num_classes=num_classes)
)
dataset = dict(
    type='visionseq_mm.LabelMapDataset', data_root=data_root, metainfo=dict(classes=classes)
)
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'), **dataset
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'), **dataset
    )
)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=20000, val_interval=2000)  # 218 epochs of 367 images
default_hooks = dict(checkpoint=dict(interval=2000, save_best='mIoU'))
