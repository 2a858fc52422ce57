# No script was released for Vim-B: that of Vim-S, with the paper's batch of 1024.
_base_ = './vim-small_8xb64_in1k.py'
model = dict(backbone=dict(arch='base'), head=dict(in_channels=768))
train_dataloader = dict(batch_size=128)
auto_scale_lr = dict(base_batch_size=1024)
