default_scope = 'mmpretrain'

# mmengine reads this before it loads any weights, so that our file formats are known in time.
custom_imports = dict(imports=['visionseq_mm.registry'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='auto'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
custom_hooks = [
    # Compares num_classes of the head with the classes of the data before the first iteration.
    dict(type='visionseq_mm.NumClassCheckHook'),
    # Random numbers of a resumed training go on where they stopped; the hook says for which loops.
    dict(type='visionseq_mm.RandomStateHook'),
]
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)
log_level = 'INFO'
load_from = None
resume = False
