# The paper trains with Swin's settings, which are those of the schedule.
_base_ = [
    '../_base_/models/upernet_secvit-base.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size))
