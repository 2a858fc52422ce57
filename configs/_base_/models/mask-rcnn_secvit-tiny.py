# Mask R-CNN on SecViT, which is a pyramid of its own. Normalised outputs and drop path are those
# of RMT, dense code of the same authors, who published none for SecViT; the statistics are frozen,
# as RMT's configs ask.
_base_ = './mask-rcnn.py'
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
