# What all schedules here share. Rate and decay are those of SecViT's paper for Mask R-CNN; ViTDet
# and Vim's detection have the same rate.
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='visionseq_mm.AmpOptimWrapper',  # on a CPU without mixed precision
    dtype='bfloat16',  # 'float32': without it on a GPU too
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # No decay of norms, biases, position tables, Vim's A_log and D, ViL's gates, layer scales.
    constructor='visionseq_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0),  # below 1: earlier layers learn more slowly
)
