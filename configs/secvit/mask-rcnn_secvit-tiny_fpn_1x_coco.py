# Rate, decay and length: SecViT's paper, appendix B.
_base_ = [
    '../_base_/models/mask-rcnn_secvit-tiny.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime_det.py',
]
