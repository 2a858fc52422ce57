# Long-sequence fine-tuning of Vim and ViL: 30 epochs at a small, constant rate.
_base_ = './adamw.py'
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=30, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = None
auto_scale_lr = dict(enable=False, base_batch_size=1024)
