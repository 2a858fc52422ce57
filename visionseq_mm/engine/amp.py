"""Mixed precision by default, on machines that have it."""

from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper as MMEngineAmpOptimWrapper
from mmengine.optim import OptimWrapper

from visionseq_mm.registry import OPTIM_WRAPPERS

DTYPES = ('bfloat16', 'float16', 'float32')


@OPTIM_WRAPPERS.register_module()
def AmpOptimWrapper(dtype='bfloat16', **kwargs):
    """mmengine's ``AmpOptimWrapper`` on an accelerator, its ``OptimWrapper`` on a CPU.

    So the same config trains in mixed precision on a GPU and in the precision of the parameters
    elsewhere, where mmengine's refuses to be built. A function that is registered like a class,
    for it builds one of the two.

    Args:
        dtype (str): What operations compute in: 'bfloat16', without a scale of the loss, for
            its exponents reach as far as float32's; 'float16', with mmengine's dynamic scale;
            'float32' is training without mixed precision.
        kwargs: Those of mmengine's wrapper.

    Raises:
        ValueError: For another ``dtype``.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f'optim_wrapper.dtype must be one of {", ".join(map(repr, DTYPES))}, got {dtype!r}'
        )
    if dtype == 'float32' or get_device() in ('cpu', 'mps'):
        for key in ('loss_scale', 'use_fsdp'):
            kwargs.pop(key, None)
        return OptimWrapper(**kwargs)
    if dtype == 'bfloat16':
        kwargs.setdefault('loss_scale', dict(enabled=False))
    return MMEngineAmpOptimWrapper(dtype=dtype, **kwargs)
