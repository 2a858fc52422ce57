# UperNet on SecViT, which is a pyramid of its own. Normalised outputs and the rate of drop path
# are those of RMT, dense code of the same authors, who published none for SecViT; the statistics
# are frozen, as RMT's configs ask.
_base_ = './upernet.py'
dims = [64, 128, 256, 512]
model = dict(
    backbone=dict(
        type='visionseq_mm.SecViT',
        arch='tiny',
        out_norm=dict(type='visionseq_mm.LN2d', eps=1e-6),
        norm_eval=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://secvit-tiny'),
    ),
    decode_head=dict(in_channels=dims, channels=512),
    auxiliary_head=dict(in_channels=dims[2]),
)
