default_scope = 'mmdet'

# mmengine reads this before it loads any weights, so that our file formats are known in time.
custom_imports = dict(imports=['visionseq_mm.registry'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
custom_hooks = [
    # Compares num_classes of the heads with the classes of the data before the first iteration.
    dict(type='visionseq_mm.NumClassCheckHook'),
    # Random numbers of a resumed training go on where they stopped; the hook says for which loops.
    dict(type='visionseq_mm.RandomStateHook'),
]
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
tta_model = dict(
    type='visionseq_mm.DetTTAModel',  # mmdet's, for masks too
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
