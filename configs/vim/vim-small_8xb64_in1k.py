# The released script pt-vim-s.sh, but for mixed precision: it trains in float32.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(arch='small', drop_path_rate=0.05), head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=512)  # at the rate that Vim-Ti has with 1024
