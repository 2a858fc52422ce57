# Rate, decay, batch and length are those of Vim's paper, appendix B; the released code has others:
# upernet_vim-small_4xb8-60k_ade20k-512x512.py.
_base_ = [
    '../_base_/models/upernet_vim-small.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(img_size=_base_.crop_size),
)
