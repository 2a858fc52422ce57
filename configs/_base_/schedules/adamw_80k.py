# 80k iterations for Semantic FPN, as PVT began them and RMT, dense code of SecViT's authors, has
# them: no warm-up, a polynomial of 0.9.
_base_ = './adamw.py'
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=8000)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type='PolyLR', eta_min=1e-6, power=0.9, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
