import pytest
import torch
from ops_twins import assert_close, mlstm_inputs, mlstm_twin, run

from visionseq_mm.ops import mlstm


@pytest.mark.parametrize('Dh', [1, 33, 96])
def test_head_dims(Dh):
    inputs = mlstm_inputs(65, Dh, H=2)
    assert_close(run(mlstm, inputs), run(mlstm_twin, inputs), 1e-10)


@pytest.mark.parametrize('eps', [0.0, 1e-6, 0.5])
@pytest.mark.parametrize('shift', [-4.0, 4.0])
def test_eps(eps, shift):
    """The stabiliser matters through eps alone, so a large eps shows whether m is the maximum."""
    q, k, v, i, f = mlstm_inputs(130)
    inputs = [q, k, v, i + shift, f]

    def of(fn):
        return lambda *xs: fn(*xs, eps=eps)

    assert_close(run(of(mlstm), inputs), run(of(mlstm_twin), inputs), 1e-9)


def test_gradcheck_of_the_maximum():
    """Across a chunk's border, with an eps that makes the gradient through m visible."""
    q, k, v, i, f = mlstm_inputs(66, Dh=2, H=1)
    inputs = [x[:1].requires_grad_() for x in (q, k, v, 2 * i, f - 2)]
    assert torch.autograd.gradcheck(lambda *xs: mlstm(*xs, eps=0.5), inputs, fast_mode=True)


def test_one_token():
    q, k, v, i, f = mlstm_inputs(1)
    C = (q * k).sum(-1) / q.shape[-1] ** 0.5
    n = torch.maximum(C.abs(), (-i).exp())
    torch.testing.assert_close(mlstm(q, k, v, i, f), (C / (n + 1e-6))[..., None] * v)


@pytest.mark.parametrize('i_gate', [-50.0, 0.0, 50.0])
@pytest.mark.parametrize('f_gate', [-50.0, 0.0, 50.0])
def test_extreme_gates(i_gate, f_gate):
    q, k, v, i, f = mlstm_inputs(130)
    inputs = [q, k, v, i + i_gate, f + f_gate]
    expected = run(mlstm_twin, inputs)
    actual = run(mlstm, inputs)
    # Below this the gradient of a gate that is shut is rounding, in the twin too.
    size = max(x.abs().max() for x in expected[1:])
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11 * size)
    for x in run(mlstm, [x.float() for x in inputs]):
        assert x.isfinite().all()


@pytest.mark.parametrize('i_gate', [-1000.0, 1000.0])
def test_exponentials_out_of_range(i_gate):
    """exp(±1000) is no float64 either."""
    q, k, v, i, f = mlstm_inputs(70)
    for dtype in (torch.float32, torch.float64):
        for x in run(mlstm, [x.to(dtype) for x in (q, k, v, i + i_gate, f)]):
            assert x.isfinite().all()


@pytest.mark.parametrize('f_gate', [-50.0, -5.0, 5.0])
def test_long_float32(f_gate):
    """The sums of the log gates reach −200 000 where float32 has no digits left."""
    q, k, v, i, f = mlstm_inputs(4096, Dh=8, H=1)
    inputs = [x.float() for x in (q, k, v, i - 1, f + f_gate)]
    expected = run(mlstm, [x.double() for x in inputs])
    actual = run(mlstm, inputs)
    if f_gate == -50:  # the forget gates' gradient is rounding, and must be as small
        assert actual.pop().abs().max() < 1e-15
        expected.pop()
    assert_close(actual, expected, 3e-5)


def test_normaliser_sees_the_rows_sum():
    """With equal keys and values the output is the value wherever the sum exceeds the bound."""
    _, k, v, i, f = mlstm_inputs(200)
    k, v = (x[:1, :1].expand_as(x) for x in (k, v))
    h = mlstm(k, k, v, i.abs() + 5, f, eps=0.0)
    torch.testing.assert_close(h, v.contiguous())
