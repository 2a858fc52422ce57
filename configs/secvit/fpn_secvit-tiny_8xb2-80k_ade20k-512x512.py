# The paper names Semantic FPN and its 80k iterations. The rest is that of RMT, dense code of the
# same authors for a similar backbone, whose configs ask for frozen statistics.
_base_ = [
    '../_base_/models/fpn.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_80k.py',
    '../_base_/default_runtime_seg.py',
]
dims = [64, 128, 256, 512]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='visionseq_mm.SecViT',
        arch='tiny',
        out_norm=dict(type='visionseq_mm.LN2d', eps=1e-6),
        norm_eval=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://secvit-tiny'),
    ),
    neck=dict(in_channels=dims),
)
train_dataloader = dict(batch_size=2)
default_hooks = dict(checkpoint=dict(interval=8000))
