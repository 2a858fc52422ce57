# Global at 1024x1024, where the paper has no run: sizes doubled, the rest as at 512x512.
_base_ = [
    '../_base_/models/upernet_secvit-large.py',
    '../_base_/datasets/ade20k_1024x1024.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(with_cp=True),
)
