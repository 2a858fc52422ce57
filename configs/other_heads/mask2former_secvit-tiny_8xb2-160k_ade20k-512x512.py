# A head of mmseg and mmdet that is none of ours, on SecViT: rates, clipping and length are mmseg's
# for Mask2Former on Swin-T.
_base_ = [
    '../_base_/models/mask2former.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
custom_imports = dict(imports=['visionseq_mm.registry', 'mmdet.models'])
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='visionseq_mm.SecViT',
        arch='tiny',
        out_norm=dict(type='visionseq_mm.LN2d', eps=1e-6),
        norm_eval=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://secvit-tiny'),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=2)
undecayed = dict(decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01),
    paramwise_cfg=dict(
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),
            query_embed=undecayed,
            query_feat=undecayed,
            level_embed=undecayed,
        )
    ),
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False)]
