# Second of two steps, at 224 pixels: ViL's configuration 6M_res224finetuning. The position table
# is resized when the first step's checkpoint is loaded; load_from is where that writes it.
_base_ = [
    '../_base_/models/classifier_vil.py',
    '../_base_/datasets/imagenet_3aug_224.py',
    '../_base_/schedules/imagenet_ft_20e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(in_channels=2 * 192))
load_from = 'work_dirs/vil2-tiny_16xb128-800e_in1k-192px/epoch_800.pth'
train_dataloader = dict(batch_size=64)
