# RetinaNet on a backbone of one resolution, with the pyramid and the padding of mask-rcnn_sfp.py.
_base_ = './retinanet.py'
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter',
        out_channels=256,
        scales=(2, 1, 0.5),  # strides 8, 16 and 32; 64 and 128 are pooled
        num_outs=5,
    ),
)
