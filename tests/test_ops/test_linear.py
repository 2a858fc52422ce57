"""Projections through oneDNN, where that is used, and through torch's own products elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from visionseq_mm.ops import linear


@pytest.fixture(params=[True, False], autouse=True)
def onednn(request):
    if request.param and not linear._works():
        pytest.skip('needs AVX-512')
    with torch.backends.mkldnn.flags(enabled=request.param):
        yield


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('sizes', [(6, 5), (5, 6), (64, 48)])
def test_linear_and_its_gradients(dtype, bias, sizes):
    M, N = sizes
    x, weight = torch.randn(2, 7, M, dtype=dtype), torch.randn(N, M, dtype=dtype)
    b = torch.randn(N, dtype=dtype) if bias else None
    x.requires_grad_(), weight.requires_grad_()
    expected = F.linear(x, weight, b)
    dout = torch.randn_like(expected)
    dx, dweight = torch.autograd.grad(expected, (x, weight), dout)
    with torch.no_grad():
        torch.testing.assert_close(linear.linear(x, weight, b), expected)
        torch.testing.assert_close(linear.input_gradient(dout, weight), dx)
        torch.testing.assert_close(linear.weight_gradient(dout, x), dweight)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_linears_and_their_gradients(dtype):
    x, weight = torch.randn(3, 2, 7, 5, dtype=dtype), torch.randn(3, 4, 5, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.einsum('sblm,snm->sbln', x, weight)
    dout = torch.randn_like(expected)
    _, dweight = torch.autograd.grad(expected, (x, weight), dout)
    with torch.no_grad():
        torch.testing.assert_close(linear.linears(x, weight), expected)
        torch.testing.assert_close(linear.weight_gradients(dout, x), dweight)
        out = torch.ones_like(expected)
        linear.add_linears(out, x, weight)
        torch.testing.assert_close(out, 1 + expected)


def test_parts_of_tensors():
    """Rows with other tensors between them, as halves of a projection are."""
    x, weight = torch.randn(2, 7, 12)[..., :6], torch.randn(12, 6)[::2]
    torch.testing.assert_close(linear.linear(x, weight), x @ weight.mT)
    for bias in (torch.randn(6, 2)[:, 0], torch.randn(1).expand(6)):
        torch.testing.assert_close(linear.linear(x, weight, bias), x @ weight.mT + bias)


def test_without_onednn(monkeypatch):
    """A torch whose private function is gone or takes other arguments."""
    linear._works.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, '_linear_pointwise', torch.ops.aten.relu)
    assert not linear._works()
    x = torch.randn(3, 4)
    torch.testing.assert_close(linear.linear(x, x), x @ x.mT)
    monkeypatch.undo()
    linear._works.cache_clear()
