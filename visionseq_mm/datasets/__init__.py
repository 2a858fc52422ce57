"""Data sets of mmdet and mmseg that say what is wrong with the data before a training begins."""

from importlib.util import find_spec

from visionseq_mm.registry import DATASETS


def _absent(name, package):
    """In place of a data set whose toolbox is not installed."""

    def refuse(*args, **kwargs):
        raise ImportError(f'visionseq_mm.{name} needs {package}: `pip install {package}`.')

    return DATASETS.register_module(name, module=refuse)


if find_spec('mmdet'):
    from visionseq_mm.datasets.coco import CocoDataset
else:
    CocoDataset = _absent('CocoDataset', 'mmdet')

if find_spec('mmseg'):
    from visionseq_mm.datasets.label_maps import ADE20KDataset, LabelMapDataset
else:
    ADE20KDataset = _absent('ADE20KDataset', 'mmsegmentation')
    LabelMapDataset = _absent('LabelMapDataset', 'mmsegmentation')

__all__ = ['ADE20KDataset', 'CocoDataset', 'LabelMapDataset']
