"""The cell: what the suite of every op does not ask."""

from functools import partial

import pytest
import torch
from ops_twins import CASES, assert_close, mlstm_inputs, mlstm_twin, run

from visionseq_mm import ops


@pytest.fixture(params=[case.backend for case in CASES if case.name == 'mlstm'])
def mlstm(request):
    return partial(ops.mlstm, backend=request.param)


@pytest.mark.parametrize('Dh', [1, 33, 96])
def test_head_dims(mlstm, Dh):
    inputs = mlstm_inputs(65, Dh, H=2)
    assert_close(run(mlstm, inputs), run(mlstm_twin, inputs), 1e-10)


@pytest.mark.parametrize('eps', [0.0, 1e-6, 0.5])
@pytest.mark.parametrize('shift', [-4.0, 4.0])
def test_eps(mlstm, eps, shift):
    """The stabiliser matters through eps alone, so a large eps shows whether m is the maximum."""
    q, k, v, i, f = mlstm_inputs(130)
    inputs = [q, k, v, i + shift, f]

    def of(fn):
        return lambda *xs: fn(*xs, eps=eps)

    assert_close(run(of(mlstm), inputs), run(of(mlstm_twin), inputs), 1e-9)


def test_gradcheck_of_the_maximum(mlstm):
    """Across a chunk's border, with an eps that makes the gradient through m visible."""
    q, k, v, i, f = mlstm_inputs(66, Dh=2, H=1)
    inputs = [x[:1].requires_grad_() for x in (q, k, v, 2 * i, f - 2)]
    assert torch.autograd.gradcheck(lambda *xs: mlstm(*xs, eps=0.5), inputs, fast_mode=True)


def test_one_token(mlstm):
    q, k, v, i, f = mlstm_inputs(1)
    C = (q * k).sum(-1) / q.shape[-1] ** 0.5
    n = torch.maximum(C.abs(), (-i).exp())
    torch.testing.assert_close(mlstm(q, k, v, i, f), (C / (n + 1e-6))[..., None] * v)


@pytest.mark.parametrize('i_gate', [-50.0, 0.0, 50.0])
@pytest.mark.parametrize('f_gate', [-50.0, 0.0, 50.0])
def test_extreme_gates(mlstm, i_gate, f_gate):
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
def test_exponentials_out_of_range(mlstm, i_gate):
    """exp(±1000) is no float64 either."""
    q, k, v, i, f = mlstm_inputs(70)
    for dtype in (torch.float32, torch.float64):
        for x in run(mlstm, [x.to(dtype) for x in (q, k, v, i + i_gate, f)]):
            assert x.isfinite().all()


@pytest.mark.parametrize('f_gate', [-50.0, -5.0, 5.0])
def test_long_float32(mlstm, f_gate):
    """The sums of the log gates reach −200 000 where float32 has no digits left."""
    q, k, v, i, f = mlstm_inputs(4096, Dh=8, H=1)
    inputs = [x.float() for x in (q, k, v, i - 1, f + f_gate)]
    expected = run(mlstm, [x.double() for x in inputs])
    actual = run(mlstm, inputs)
    if f_gate == -50:  # the forget gates' gradient is rounding, and must be as small
        assert actual.pop().abs().max() < 1e-15
        expected.pop()
    assert_close(actual, expected, 3e-5)


def test_normaliser_sees_the_rows_sum(mlstm):
    """With equal keys and values the output is the value wherever the sum exceeds the bound."""
    _, k, v, i, f = mlstm_inputs(200)
    k, v = (x[:1, :1].expand_as(x) for x in (k, v))
    h = mlstm(k, k, v, i.abs() + 5, f, eps=0.0)
    torch.testing.assert_close(h, v.contiguous())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('Dh', [96, 192])
def test_precision(mlstm, dtype, Dh):
    """With forget gates as at the start of training and sums that cancel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 600, 2, Dh, generator=generator, dtype=torch.float64)
    i = torch.randn(1, 600, 2, generator=generator, dtype=torch.float64)
    f = torch.linspace(3, 6, 2, dtype=torch.float64) + 0.1 * i.flip(1)
    inputs = [x.to(dtype) for x in (q, k, v, i, f)]
    expected = run(mlstm_twin, [x.double() for x in inputs])
    actual = run(mlstm, inputs)
    assert_close(actual[:1], expected[:1], 5e-3 if dtype == torch.bfloat16 else 1e-5)
    assert_close(actual, expected, 1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_closed_input_gates(mlstm):
    """A token whose gate is exp(−∞) does not exist for the others."""
    q, k, v, i, f = mlstm_inputs(70)
    i[:, 40] = -torch.inf
    f[:, 40] = torch.inf
    rest = [torch.cat([x[:, :40], x[:, 41:]], 1) for x in (q, k, v, i, f)]
    h = mlstm(q, k, v, i, f)
    torch.testing.assert_close(torch.cat([h[:, :40], h[:, 41:]], 1), mlstm(*rest))


def test_bad_dtypes():
    q, k, v, i, f = mlstm_inputs(7)
    with pytest.raises(ValueError, match=r'mlstm: v has dtype torch\.float32, and beside q'):
        ops.mlstm(q, k, v.float(), i, f)
    with pytest.raises(ValueError, match=r'mlstm: i has dtype torch\.bfloat16'):
        ops.mlstm(q.half(), k.half(), v.half(), i.bfloat16(), f.half())
