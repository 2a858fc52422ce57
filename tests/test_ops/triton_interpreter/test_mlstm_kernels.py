"""The mLSTM cell in Triton against the reference in float64, in chunks and tiles made small."""

import pytest
import torch
from ops_twins import assert_close, mlstm_inputs, run

from visionseq_mm.ops import mlstm
from visionseq_mm.ops.mlstm import triton as kernels

RATIO = 1e-5
# Of weights above the diagonal, before they are masked.
pytestmark = pytest.mark.filterwarnings('ignore:.*encountered in:RuntimeWarning')


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sets the tokens of a chunk and of a tile, and the rows of a tile of weights."""

    def sizes(chunk=32, tile=16, rows=32):
        for name, value in dict(
            CHUNK=chunk,
            CHUNK_OF_WIDE=chunk,
            TILE=tile,
            TILE_OF_FLOAT32=tile,
            ROWS_OF_WIDE=rows,
            AHEAD=2,
        ).items():
            monkeypatch.setattr(kernels, name, value)

    sizes()
    return sizes


def inputs_of(S, Dh, H=1, B=1, dtype=torch.float32):
    return [x[:B].to(dtype) for x in mlstm_inputs(S, Dh, H)]


def check(inputs, ratio=RATIO, gradients=None, **kwargs):
    """Output and gradients against those of the same inputs in float64."""
    expected = run(
        lambda *xs: mlstm(*xs, backend='reference', **kwargs), [x.double() for x in inputs]
    )
    actual = run(lambda *xs: mlstm(*xs, backend='triton', **kwargs), inputs)
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]
    assert_close(actual[:1], expected[:1], ratio)
    assert_close(actual[1:], expected[1:], gradients or ratio)


@pytest.mark.parametrize(
    'B, S, H, Dh, reverse, sizes',
    [
        (2, 1, 3, 6, False, {}),
        (2, 7, 2, 16, True, dict(chunk=16)),
        (1, 63, 1, 40, False, {}),
        (1, 64, 2, 6, True, dict(tile=32)),
        (1, 65, 1, 96, True, dict(tile=32)),
        (1, 130, 1, 6, False, dict(chunk=16)),
        (1, 200, 1, 1, True, dict(chunk=64, tile=32)),
        (1, 40, 1, 130, False, {}),
    ],
)
def test_sizes(B, S, H, Dh, reverse, sizes, small):
    small(**sizes)
    check(inputs_of(S, Dh, H, B), reverse=reverse)


@pytest.mark.parametrize('i_gate, f_gate', [(0, -20), (0, 3), (50, 3), (-50, -20)])
def test_gates(i_gate, f_gate):
    q, k, v, i, f = inputs_of(65, 6)
    check([q, k, v, i + i_gate, f + f_gate])


def test_tokens_without_weight():
    """More of them than a chunk has, as for padding."""
    q, k, v, i, f = inputs_of(100, 6)
    i[:, 20:70] = -torch.inf
    check([q, k, v, i, f])


@pytest.mark.parametrize('reverse', [False, True])
def test_run_of_rows_that_share_a_maximum(reverse, small):
    """Over several chunks, with an eps that makes the gradient through the maximum visible."""
    small(chunk=16)
    q, k, v, i, f = inputs_of(100, 6)
    slope = torch.linspace(6, 0, 100)[None, :, None]
    check([q, k, v, i + (slope.flip(1) if reverse else slope), f + 3], eps=0.5, reverse=reverse)


def test_sums_that_cancel():
    """Each key's opposite follows it, and the normaliser is what rounding spares of the sums.

    No worse, but for a factor, than the reference in float32.
    """
    q, k, v, i, f = inputs_of(65, 6)
    k[:, 1::2] = -1.001 * k[:, :-1:2]
    i[:, 1::2] = i[:, :-1:2]
    inputs = [q, k, v, i + 8, f + 12]
    expected, least = (
        run(lambda *xs: mlstm(*xs, backend='reference'), [x.to(dtype) for x in inputs])
        for dtype in (torch.float64, torch.float32)
    )
    actual = run(lambda *xs: mlstm(*xs, backend='triton'), inputs)
    for x, y, z in zip(actual, expected, least, strict=True):
        assert (x - y).norm() <= 4 * (z - y).norm() + RATIO * y.norm()


def test_float16():
    q, k, v, i, f = inputs_of(65, 16, dtype=torch.float16)
    check([q, k, v, i, f], 5e-3, 1e-2)
    check([q, k, v, i.float(), f.float()], 5e-3, 1e-2)


def test_forget_gates_in_half_precision(small):
    """What two sums over the rest of a chunk leave of them, but none of its rounding errors."""
    small(chunk=128, tile=32)
    q, k, v, i, f = inputs_of(130, 64)
    inputs = [*(x.half() for x in (q, k, v)), i, f - 4]
    wide = [x.double() for x in inputs]
    expected = run(lambda *xs: mlstm(*xs, backend='reference'), wide)[-1:]
    assert_close(run(lambda *xs: mlstm(*xs, backend='triton'), inputs)[-1:], expected, 1e-3)


def test_views_equal_copies(small):
    """Slices of wider tensors, transposed heads, and a last dimension that is not dense."""
    small(chunk=16)
    q, k, v, i, f = inputs_of(20, 8, H=2)
    kv, gates = torch.cat([k, v], -1), torch.cat([i, f], -1)
    views = [
        q.mT.contiguous().mT,
        kv[..., :8].transpose(1, 2).contiguous().transpose(1, 2),
        kv[..., 8:],
        gates[..., :2],
        gates[..., 2:],
    ]

    def op(*xs):
        return mlstm(*xs, reverse=True, backend='triton')

    for x, y in zip(run(op, views), run(op, [q, k, v, i, f]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('reverse', [False, True])
def test_flipped(reverse):
    """A direction is the other one of flipped tokens, to the last bit."""
    inputs = inputs_of(35, 6)
    h, sums = kernels.forward(*inputs, reverse, 1e-6)
    flipped, flipped_sums = kernels.forward(*(x.flip(1) for x in inputs), not reverse, 1e-6)
    assert torch.equal(h, flipped.flip(1))
    assert torch.equal(sums, flipped_sums)


@pytest.mark.parametrize('name', ['q', 'k', 'v', 'i', 'f'])
def test_nan_stays(name, small):
    small(chunk=16)
    inputs = inputs_of(40, 6, H=2)
    inputs['qkvif'.index(name)][0, 20, 1] = torch.nan
    h, _ = kernels.forward(*inputs, False, 1e-6)
    spoilt = h.isnan().any(-1)[0]
    assert spoilt[20 : 21 if name == 'q' else None, 1].all()
    assert not spoilt[:16].any()
    assert not spoilt[:, 0].any()


def test_same_bits(small):
    small(chunk=16)
    inputs = inputs_of(40, 6)

    def once():
        return run(lambda *xs: mlstm(*xs, backend='triton'), inputs)

    for x, y in zip(once(), once(), strict=True):
        assert torch.equal(x, y)
