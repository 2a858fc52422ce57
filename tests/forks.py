"""Where tests have to know whether OpenMMLab's packages or the onedl forks are installed."""

from importlib.metadata import distributions


def installed(name):
    return any(distributions(name=name))


ONEDL_MMDET = installed('onedl-mmdetection')
#: mmengine, and its fork, look for a package `mmsegmentation` when a base config is `mmseg::...`.
ONEDL_MMSEG = installed('onedl-mmsegmentation')
#: It has lists and rules of its own for what it is asked to train.
ONEDL_MIM = installed('onedl-mim')
#: What mim calls mmdet.
MMDET = 'onedl-mmdetection' if ONEDL_MIM else 'mmdet'
