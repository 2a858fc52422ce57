# A quarter of the epochs: ViL's configuration 80M_res224finetuning_e5.
_base_ = './vil2-tiny_16xb64-ft-20e_in1k.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2, drop_path_decay=False),
    head=dict(in_channels=2 * 768),
)
load_from = 'work_dirs/vil2-base_16xb128-400e_in1k-192px/epoch_400.pth'
train_cfg = dict(max_epochs=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=1, end=5, convert_to_iter_based=True),
]
