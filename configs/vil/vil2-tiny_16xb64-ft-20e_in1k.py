# Second of two steps, at 224 pixels: ViL's configuration 6M_res224finetuning. The position table
# is resized when the first step's checkpoint is loaded; load_from is where that writes it.
_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_3aug_224.py',
    '../_base_/schedules/imagenet_vil_400e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(type='visionseq_mm.ViL', arch='tiny', out_type='cls'),
    head=dict(
        in_channels=2 * 192, loss=dict(_delete_=True, type='CrossEntropyLoss', use_soft=True)
    ),
)
load_from = 'work_dirs/vil2-tiny_16xb128-800e_in1k-192px/epoch_800.pth'
train_cfg = dict(max_epochs=20, val_interval=1)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=1e-5), clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=20, convert_to_iter_based=True),
]
