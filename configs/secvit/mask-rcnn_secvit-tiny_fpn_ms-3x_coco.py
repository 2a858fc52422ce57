# Rate, decay and length: SecViT's paper, appendix B. Normalised outputs and drop path: RMT, dense
# code of the same authors, who published none for SecViT; frozen statistics, as its configs ask.
_base_ = [
    '../_base_/models/mask-rcnn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        type='visionseq_mm.SecViT',
        arch='tiny',
        out_norm=dict(type='visionseq_mm.LN2d', eps=1e-6),
        norm_eval=True,
        drop_path_rate=0.1,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://secvit-tiny'),
    ),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5),
)
