"""Rotary embedding and depth-wise convolution in Triton, against plain PyTorch in float64."""

from functools import partial

import pytest
import torch
from ops_twins import assert_close, normal
from ops_twins import run as with_gradients

from visionseq_mm.ops import depthwise_conv2d, rotary_2d
from visionseq_mm.ops.depthwise_conv2d import triton as conv
from visionseq_mm.ops.rotary_2d import triton as rotary

RATIO = {torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several programs, and channels beside those of the last tile."""
    monkeypatch.setattr(rotary, 'TILE', 64)
    monkeypatch.setattr(rotary, 'CHANNELS', 16)
    for name, value in dict(ROWS=3, COLUMNS=2, CHANNELS=32, TILE=128, PROGRAMS=4).items():
        monkeypatch.setattr(conv, name, value)


def turned(q, k, backend):
    return torch.stack(rotary_2d(q, k, backend))


@pytest.mark.parametrize('dtype', RATIO)
@pytest.mark.parametrize(
    'B, h, w, H, Dh', [(1, 1, 1, 1, 4), (2, 3, 5, 1, 16), (1, 5, 3, 3, 12), (1, 7, 2, 2, 64)]
)
def test_rotary(B, h, w, H, Dh, dtype):
    """Views of thirds, and the other way round with gradients."""
    q, k, _ = normal((B, h, w, 3, H, Dh))[0].to(dtype).unbind(3)
    actual = with_gradients(partial(turned, backend='triton'), [q, k])
    assert all(x.is_contiguous() and x.dtype == dtype for x in actual)
    wide = with_gradients(partial(turned, backend='reference'), [q.double(), k.double()])
    assert_close(actual, wide, RATIO[dtype])


def test_rotary_of_other_views():
    q, k = (x.float() for x in normal((2, 3, 8, 5, 2), (2, 2, 5, 3, 8)))
    q, k = q.permute(0, 3, 1, 4, 2), k.permute(0, 2, 3, 1, 4)
    for a, b in zip(
        rotary.rotate(q, k, False),
        rotary.rotate(q.contiguous(), k.contiguous(), False),
        strict=True,
    ):
        assert torch.equal(a, b)


def layer(B, h, w, C, K):
    """dout, x, weight, bias; x a third of a wider tensor."""
    shapes = (B, w, h, C), (B, h, w, 3 * C), (C, 1, K, K), (C,)
    dout, x, weight, bias = (x.float() for x in normal(*shapes))
    return dout.transpose(1, 2), x[..., C : 2 * C], weight / K, bias


def run(dout, *inputs, residual, backend='triton'):
    """Output and gradients of x, weight and bias."""
    op = partial(depthwise_conv2d, residual=residual, backend=backend)
    return with_gradients(op, inputs, dout)


def wide(*inputs, residual):
    return run(*(t.double() for t in inputs), residual=residual, backend='reference')


@pytest.mark.parametrize(
    'B, h, w, C, K, residual',
    [
        (1, 1, 1, 3, 1, True),
        (2, 5, 7, 20, 3, False),
        (2, 7, 4, 48, 3, True),
        (1, 9, 6, 40, 5, True),
        (1, 4, 5, 8, 7, False),
    ],
)
def test_depthwise(B, h, w, C, K, residual):
    inputs = layer(B, h, w, C, K)
    actual = run(*inputs, residual=residual)
    assert actual[0].is_contiguous() and actual[1].is_contiguous()
    assert_close(actual, wide(*inputs, residual=residual), 3 * RATIO[torch.float32])


def test_depthwise_in_half_precision():
    inputs = [x.half() for x in layer(1, 5, 6, 20, 3)]
    actual = run(*inputs, residual=True)
    assert all(x.dtype == torch.float16 for x in actual)
    assert_close(actual, wide(*inputs, residual=True), RATIO[torch.float16])


def test_depthwise_same_bits_of_views_and_copies():
    dout, x, weight, bias = layer(1, 5, 4, 16, 3)
    expected = run(dout.contiguous(), x.contiguous(), weight, bias, residual=True)
    strided = weight.transpose(0, 3).contiguous().transpose(0, 3)
    for views in ((dout, x), (dout.mT.contiguous().mT, x.mT.contiguous().mT)):
        for a, b in zip(run(*views, strided, bias, residual=True), expected, strict=True):
            assert torch.equal(a, b)
    one = torch.ones(1, 1, 1, 1).expand(dout.shape)
    for a, b in zip(
        conv.backward(one, x, weight, False),
        conv.backward(one.contiguous(), x, weight, False),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_depthwise_nan_spreads_as_far_as_the_taps():
    _, x, weight, bias = layer(1, 6, 9, 8, 3)
    x[0, 2, 8, 5] = torch.nan
    around = torch.zeros(1, 6, 9, 8, dtype=torch.bool)
    around[:, 1:4, 7:, 5] = True
    assert torch.equal(conv.forward(x, weight, bias, False).isnan(), around)
