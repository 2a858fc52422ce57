# Mask R-CNN of ViTDet (Li et al., arXiv 2203.16527) on a backbone of one resolution: a simple
# feature pyramid, LayerNorm in the heads, two convolutions in the RPN and four in the box head.
# Images are padded to 1024x1024 in training and testing, so that the backbone always sees the grid
# that it was tuned for.
_base_ = './mask-rcnn.py'
norm_cfg = dict(type='visionseq_mm.LN2d', eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter', out_channels=256, num_outs=5, norm_cfg=norm_cfg
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
