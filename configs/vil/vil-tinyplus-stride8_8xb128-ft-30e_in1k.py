# Long-sequence fine-tuning, ViL's configuration longseq/vil: patches overlap by half, 729 tokens
# instead of 196; a small rate, constant after the warm-up.
_base_ = './vil-tinyplus_8xb128-400e_in1k.py'
model = dict(backbone=dict(stride=8))
load_from = 'visionseq://vil-tinyplus/cls'
train_cfg = dict(max_epochs=30, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8), clip_grad=None)
param_scheduler = [dict(type='LinearLR', start_factor=1e-6, end=5, convert_to_iter_based=True)]
