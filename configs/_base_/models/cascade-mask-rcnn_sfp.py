# Cascade Mask R-CNN of ViTDet: as mask-rcnn_sfp.py, with three box heads.
_base_ = './cascade-mask-rcnn.py'
norm_cfg = dict(type='visionseq_mm.LN2d', eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter', out_channels=256, num_outs=5, norm_cfg=norm_cfg
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(head, type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg)
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
