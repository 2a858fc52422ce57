"""Let ``import mmcv._ext`` find our stand-in when mmcv has no compiled operators.

The entry point group ``torch.backends`` names :func:`install`, so torch calls
it at the end of every ``import torch`` of the environment, in spawned worker
processes too; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that off. For this
reason the module uses nothing but the standard library.
"""

import importlib.util
import sys
from pathlib import Path

_STAND_IN = Path(__file__).with_name('mmcv_ext.py')


class MmcvExtFinder:
    """Finder for the one name ``mmcv._ext``; it loads ``mmcv_ext.py`` under that name."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """The stand-in's module spec, or None for any other module."""
        if fullname != 'mmcv._ext':
            return None
        return importlib.util.spec_from_file_location(fullname, _STAND_IN)


def install() -> None:
    """Append the finder to ``sys.meta_path``, once.

    Being last, it is asked only when nobody else has found the module: a
    compiled ``mmcv._ext`` always wins.
    """
    if MmcvExtFinder not in sys.meta_path:
        sys.meta_path.append(MmcvExtFinder)
