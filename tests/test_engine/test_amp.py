"""Mixed precision where the machine has it, and the parameters' precision elsewhere."""

import pytest
import torch
from mmengine.optim import AmpOptimWrapper as MMEngineAmpOptimWrapper
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from visionseq_mm.engine import amp


def build(**settings):
    return build_optim_wrapper(
        nn.Linear(2, 2),
        dict(
            type='visionseq_mm.AmpOptimWrapper',
            optimizer=dict(type='SGD', lr=0.5),
            clip_grad=dict(max_norm=1.0),
            accumulative_counts=2,
            **settings,
        ),
    )


@pytest.fixture
def gpu(monkeypatch):
    """mmengine believes in a GPU; its loss scaler, which needs one, is off for bfloat16."""
    monkeypatch.setattr(amp, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('dtype', amp.DTYPES)
def test_cpu(dtype):
    wrapper = build(dtype=dtype, loss_scale='dynamic')
    assert type(wrapper) is OptimWrapper
    assert wrapper.clip_grad_kwargs == dict(max_norm=1.0)
    assert wrapper._accumulative_counts == 2


@pytest.mark.gpu
def test_gpu():
    for dtype, scaled in (('bfloat16', False), ('float16', True)):
        wrapper = build(dtype=dtype)
        assert isinstance(wrapper, MMEngineAmpOptimWrapper)
        assert wrapper.cast_dtype == getattr(torch, dtype)
        assert wrapper.loss_scaler.is_enabled() is scaled
    assert type(build(dtype='float32')) is OptimWrapper


def test_bfloat16_needs_no_scale_of_the_loss(gpu):
    wrapper = build()
    assert isinstance(wrapper, MMEngineAmpOptimWrapper)
    assert wrapper.cast_dtype == torch.bfloat16
    assert not wrapper.loss_scaler.is_enabled()


def test_float32_on_a_gpu_is_no_mixed_precision(gpu):
    assert type(build(dtype='float32')) is OptimWrapper


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"dtype must be one of 'bfloat16', .* got 'half'"):
        build(dtype='half')
