# For small models from scratch: AdamW, warm-up, linear decay to zero, counted in iterations; the
# child sets max_iters. Rate and clipping were found by trying; the decay is that of the Vim-S, ViL
# and SecViT papers.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # Not decayed: what has one dimension (norms, also those whose gain is 1 + weight, biases, the
    # skips D of Vim) and position tables.
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, by_epoch=False),
]
