"""Data sets of mmdet and mmseg that say what is wrong with the data before a training begins."""

from importlib.util import find_spec

from visionseq_mm.registry import DATASETS, register_absent

if find_spec('mmdet'):
    from visionseq_mm.datasets.coco import CocoDataset
else:
    CocoDataset = register_absent(DATASETS, 'CocoDataset', 'mmdet')

if find_spec('mmseg'):
    from visionseq_mm.datasets.label_maps import ADE20KDataset, LabelMapDataset
else:
    ADE20KDataset = register_absent(DATASETS, 'ADE20KDataset', 'mmsegmentation')
    LabelMapDataset = register_absent(DATASETS, 'LabelMapDataset', 'mmsegmentation')

__all__ = ['ADE20KDataset', 'CocoDataset', 'LabelMapDataset']
