# What all schedules here share. Rate and decay are those of SecViT's paper for Mask R-CNN; ViTDet
# and Vim's detection have the same rate.
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # Not decayed: what has one dimension (norms, also those whose gain is 1 + weight, biases, the
    # skips D of Vim), position tables, and Vim's A_log, which its authors mark so.
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            'pos_embed': dict(decay_mult=0.0),
            'A_log': dict(decay_mult=0.0),
            'A_b_log': dict(decay_mult=0.0),
        },
    ),
)
