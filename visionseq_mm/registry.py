"""Registries of the scope ``visionseq_mm``.

mmengine imports ``<scope>.registry`` when it meets a scoped type, so that
``type='visionseq_mm.Vim'`` resolves from mmdet, mmseg and mmpretrain alike,
without a ``custom_imports`` of the modules themselves (``locations`` does it).

Importing this module also puts the stand-in for mmcv's compiled operators, the
safe checkpoint loaders and the FLOP counts of our ops in place (see
``visionseq_mm.compat``), and makes ``visionseq://`` known to mmengine (see
``visionseq_mm.checkpoints``).
"""

import torch
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry
from mmengine.utils import digit_version

# An ImportError would be swallowed by mmengine's scope look-up and end as "Vim is not in the
# registry", so this is a RuntimeError.
if digit_version(torch.__version__) < digit_version('2.6.0'):
    raise RuntimeError(
        f'visionseq_mm needs torch >= 2.6 (safe loading of checkpoints), got {torch.__version__}. '
        'Install a newer torch, e.g. `pip install "torch>=2.6" torchvision`.'
    )

from visionseq_mm import checkpoints
from visionseq_mm.compat import autoload, flop_handles, safe_load

autoload.install()
safe_load.install()
flop_handles.install()
checkpoints.install()

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='visionseq_mm',
    locations=[
        'visionseq_mm.backbones',
        'visionseq_mm.necks',
        'visionseq_mm.layers',
        'visionseq_mm.data_preprocessors',
        'visionseq_mm.test_time_aug',
    ],
)
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='visionseq_mm', locations=['visionseq_mm.datasets']
)
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='visionseq_mm', locations=['visionseq_mm.engine']
)
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='visionseq_mm',
    locations=['visionseq_mm.engine'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='visionseq_mm',
    locations=['visionseq_mm.engine'],
)


def register_absent(registry, name, package):
    """Register, in place of what needs a toolbox that is not installed, a refusal to build it.

    Args:
        registry (Registry): Where.
        name (str): Of what is absent.
        package (str): What pip installs.

    Returns:
        Callable: Raises an ImportError that says how to install it.
    """

    def refuse(*args, **kwargs):
        raise ImportError(f'visionseq_mm.{name} needs {package}: `pip install {package}`.')

    return registry.register_module(name, module=refuse)
