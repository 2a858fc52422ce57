# Long-sequence fine-tuning, the released script ft-vim-t.sh: patches overlap by half, 729 tokens
# instead of 196; a small, constant rate. The script's own start shifts half of the position table
# by one row, which this does not.
_base_ = './vim-tiny_8xb128_in1k.py'
model = dict(backbone=dict(stride=8))
load_from = 'visionseq://vim-tiny/cls'
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = None
