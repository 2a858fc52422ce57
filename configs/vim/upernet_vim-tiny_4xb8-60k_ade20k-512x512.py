# The settings of Vim's released code (its script ft_vim_tiny), which are not those of its paper:
# upernet_vim-tiny_4xb4-160k_ade20k-512x512.py.
_base_ = './upernet_vim-tiny_4xb4-160k_ade20k-512x512.py'
# Its decay by layers, 0.92, misses the blocks and the heads; these two get that of the stem.
stem = dict(lr_mult=0.92**25)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(custom_keys={'patch_embed': stem, 'pos_embed': stem}),
)
model = dict(test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)))
train_cfg = dict(max_iters=60000, val_interval=1000)
train_dataloader = dict(batch_size=8)
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=2, save_best='mIoU'))
auto_scale_lr = dict(base_batch_size=32)
