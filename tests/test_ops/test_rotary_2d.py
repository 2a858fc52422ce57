import pytest
import torch
from ops_twins import assert_close, normal, run

from visionseq_mm.ops import rotary_2d
from visionseq_mm.ops.dispatch import INSTALLED
from visionseq_mm.ops.rotary_2d import BACKENDS, frequencies

NAMES = ['reference']
if 'cpu' in BACKENDS.names and INSTALLED['numba']:
    NAMES.append('cpu')

pytestmark = pytest.mark.parametrize('backend', NAMES)

SHAPES = [(1, 1, 1, 1, 4), (2, 3, 5, 2, 8), (1, 7, 2, 3, 12), (1, 5, 16, 2, 32), (2, 2, 3, 1, 64)]


def twin(q, k):
    """Pairs of channels as complex numbers, times exp(i θ) of their row or column."""
    _, h, w, _, Dh = q.shape
    n = Dh // 4
    theta = [torch.tensor(10000 ** -(i / max(1, n - 1))).float().double() for i in range(n)]

    def turn(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        out = torch.empty_like(pairs)
        for y in range(h):
            for z in range(w):
                angles = torch.stack([y * t for t in theta] + [z * t for t in theta])
                out[:, y, z] = pairs[:, y, z] * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(out).flatten(-2)

    return turn(q), turn(k)


def op(backend):
    return lambda q, k: torch.stack(rotary_2d(q, k, backend))


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_twin(backend, shape):
    inputs = normal(shape, shape)
    inputs[1] = inputs[1].flip(0, 1)
    actual = run(op(backend), inputs)
    assert_close(actual, run(lambda *xs: torch.stack(twin(*xs)), inputs), 1e-7)


@pytest.mark.parametrize('dtype, ratio', [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_other_dtypes(backend, dtype, ratio):
    inputs = normal(*[(2, 9, 17, 2, 32)] * 2)
    actual = run(op(backend), [x.to(dtype) for x in inputs])
    assert all(x.dtype == dtype for x in actual)
    rounded = [x.to(dtype).double() for x in inputs]
    assert_close(actual, run(lambda *xs: torch.stack(twin(*xs)), rounded), ratio)


def test_frequencies(backend):
    theta = frequencies(16, torch.device('cpu'), torch.float32)
    torch.testing.assert_close(theta, 10000 ** -(torch.arange(4) / 3))
    assert frequencies(4, torch.device('cpu'), torch.float32).tolist() == [1]


def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in normal((1, 2, 2, 1, 8), (1, 2, 2, 1, 8))]
    torch.autograd.gradcheck(lambda *xs: rotary_2d(*xs, backend), inputs)
    torch.autograd.gradgradcheck(
        lambda *xs: rotary_2d(*xs, backend), [x[:, :1, 1:] for x in inputs]
    )


def test_products_depend_on_distance(backend):
    """And lengths stay."""
    q, k = (x.expand(1, 6, 7, 1, 16) for x in normal((1, 1, 1, 1, 16), (1, 1, 1, 1, 16)))
    q_, k_ = rotary_2d(q, k, backend)
    torch.testing.assert_close(q_.norm(dim=-1), q.norm(dim=-1))
    product = torch.einsum('bijhd,bxyhd->ijxy', q_, k_)
    torch.testing.assert_close(product[1:, 2:, 1:, 2:], product[:-1, :-2, :-1, :-2])


def test_views_equal_copies(backend):
    q, k, _ = normal((2, 3, 5, 3, 2, 8))[0].unbind(3)
    strided = q.permute(4, 0, 3, 2, 1).contiguous().permute(1, 4, 3, 2, 0)
    expected = rotary_2d(q.contiguous(), k.contiguous(), backend)
    for views in ((q, k), (strided, k)):
        for a, b in zip(rotary_2d(*views, backend), expected, strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b)


def test_nan_stays_in_its_pair(backend):
    q, k = normal((1, 3, 4, 2, 8), (1, 3, 4, 2, 8))
    q[0, 1, 2, 1, 4] = torch.nan
    q_, k_ = rotary_2d(q, k, backend)
    assert q_.isnan().nonzero().tolist() == [[0, 1, 2, 1, 4], [0, 1, 2, 1, 5]]
    assert not k_.isnan().any()


@pytest.mark.parametrize('inverse', [False, True])
def test_registration(backend, inverse):
    q, k = (x.requires_grad_() for x in normal((2, 3, 2, 2, 8), (2, 3, 2, 2, 8)))
    torch.library.opcheck(torch.ops.visionseq_mm.rotary_2d.default, (q, k, inverse, backend))


def test_bad_arguments(backend):
    q, k = normal((1, 2, 3, 1, 8), (1, 2, 3, 1, 8))
    with pytest.raises(ValueError, match=r'k must be .* = \(1, 2, 3, 1, 8\), got'):
        rotary_2d(q, k[:, :1], backend)
    with pytest.raises(ValueError, match='multiple of 4, got 6'):
        rotary_2d(q[..., :6], k[..., :6], backend)
    with pytest.raises(ValueError, match='empty along w'):
        rotary_2d(q[:, :, :0], k[:, :, :0], backend)
    with pytest.raises(ValueError, match='k has dtype'):
        rotary_2d(q, k.float(), backend)
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        rotary_2d(q, k, 'gpu')
