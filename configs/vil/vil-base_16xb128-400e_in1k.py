_base_ = './vil-tiny_8xb128-400e_in1k.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2, drop_path_decay=False),
    head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=2048)
