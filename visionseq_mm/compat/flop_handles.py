"""mmengine's FLOP analyser counts our ops, without a script of our own.

``get_model_complexity_info``, and with it mmdet's ``get_flops.py``, takes no handles, so they have
to be in the table that every analyser starts with.
"""

import importlib

_COUNTED = (
    'vim_mixer',
    'selective_scan',
    'conv1d_silu',
    'vil_mixer',
    'mlstm',
    'sec_attention',
    'depthwise_conv2d',
)
_WITHOUT_FLOPS = ('sec_partition', 'rotary_2d')  # and without a warning


def _handle(name):
    """What counts the op ``name``; our ops are imported when a trace has one of them."""

    def count(inputs, outputs):
        flops = importlib.import_module('visionseq_mm.analysis.flops')
        return flops.HANDLES[name](inputs, outputs)

    return count


def install() -> None:
    """Add what counts our ops to mmengine's table, where nobody else counts them yet.

    An mmengine without such a table goes on naming them as unsupported operators.
    """
    try:
        from mmengine.analysis import complexity_analysis

        table = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    except (ImportError, AttributeError):
        return
    for op in _COUNTED:
        name = f'visionseq_mm::{op}'
        table.setdefault(name, _handle(name))
    for op in _WITHOUT_FLOPS:
        table.setdefault(f'visionseq_mm::{op}', None)
