"""Cluster attention in Triton against the reference in float64, with tiles made small."""

import pytest
import torch
from ops_twins import assert_close, normal, run

from visionseq_mm.ops import sec_attention
from visionseq_mm.ops.cluster_attention import reference
from visionseq_mm.ops.cluster_attention import triton as kernels

RATIO = 1e-5
# Of rows past the end of a cluster, which are not stored.
pytestmark = pytest.mark.filterwarnings('ignore:.*encountered in:RuntimeWarning')


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sets the parts of a program's tile, their rows, and rows of a tile that it walks past."""

    def sizes(parts=2, rows=16, columns=32):
        for name in ('FORWARD', 'QUERIES', 'KEYS', 'FLOAT32'):
            tiles = dict.fromkeys((16, 32, 64, 128), (parts, rows, columns, 4, 2, None))
            monkeypatch.setattr(kernels, name, tiles)

    sizes()
    return sizes


def attend(idx, K, valid=None, backend='triton'):
    def op(q, k, v, lepe=None):
        return sec_attention(q, k, v, idx, K, valid, backend, lepe)

    return op


def check(inputs, K, valid=None, ratio=RATIO, gradients=None, dout=None):
    """Output and gradients against those of the same inputs in float64."""
    idx = reference.partition(inputs[1], K, valid)
    wide = [x.double() for x in inputs]
    expected = run(attend(idx, K, valid, 'reference'), wide, dout)
    if valid is not None:
        inputs = [x.masked_fill(~valid[:, :, None, None], torch.nan) for x in inputs]
    actual = run(attend(idx, K, valid), inputs, dout)
    assert all(x.dtype == inputs[0].dtype for x in actual)
    assert_close(actual[:1], expected[:1], ratio)
    assert_close(actual[1:], expected[1:], gradients or ratio)
    if valid is not None:
        assert all((x[~valid] == 0).all() for x in actual)


def inputs_of(B, L, H, Dh, lepe=True, dtype=torch.float32):
    return [x.to(dtype) for x in normal(*[(B, L, H, Dh)] * (4 if lepe else 3))]


@pytest.mark.parametrize(
    'B, L, H, Dh, K, lepe, sizes',
    [
        (2, 7, 2, 6, 2, True, {}),
        (1, 64, 1, 16, 1, False, {}),
        (1, 65, 1, 32, 1, True, {}),
        (1, 75, 1, 32, 2, True, dict(parts=1)),
        (1, 101, 1, 40, 3, True, dict(rows=32, columns=16)),
        (1, 70, 1, 64, 2, False, {}),
        (1, 33, 1, 128, 1, True, {}),
        (1, 129, 1, 17, 2, False, dict(parts=3)),
        (1, 9, 1, 1, 4, True, {}),
    ],
)
def test_sizes(B, L, H, Dh, K, lepe, sizes, small):
    small(**sizes)
    check(inputs_of(B, L, H, Dh, lepe), K)


@pytest.mark.parametrize('L, K', [(70, 1), (70, 3), (23, 6)])
def test_invalid_tokens(L, K):
    """In samples of all, many, four and no valid tokens; NaN in the others."""
    valid = torch.rand(4, L, generator=torch.Generator().manual_seed(0)) < 0.7
    valid[0], valid[2:] = True, False
    valid[2, [3, 8, 11, 22]] = True
    check(inputs_of(4, L, 1, 16), K, valid)


def test_float16():
    check(inputs_of(1, 70, 1, 32, dtype=torch.float16), 1, ratio=2e-3, gradients=4e-3)


def test_scores_far_from_zero():
    """Maxima that grow from tile to tile, and sums whose exponentials float32 does not hold."""
    q, k, v = inputs_of(1, 80, 1, 16, lepe=False)
    q[:, :40] = q[:, :40].abs() + 4
    q[:, 40:] = -q[:, 40:].abs() - 4
    k = (k.abs() + 1) * torch.linspace(6, 12, 80)[:, None, None]
    idx = torch.arange(80, dtype=torch.int32).expand(1, 1, 80)
    wide = [x.double() for x in (q, k, v)]
    expected = run(attend(idx, 1, backend='reference'), wide)
    _, _, sums = kernels.forward(q, k, v, idx.contiguous(), 1, None, None, True)
    assert sums.max() > 120
    assert sums.min() < -120
    assert_close(run(attend(idx, 1), [q, k, v]), expected, 1e-3)


@pytest.mark.parametrize('dout', ['expanded', 'transposed'])
def test_views_equal_copies(dout, small):
    """A third of a wider tensor, transposed heads, a last dimension that is not dense."""
    small(parts=1, rows=32)
    B, L, H, Dh = 2, 19, 2, 16
    q, k, v, lepe = inputs_of(B, L, H, Dh)
    third = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)[..., 2 * H * Dh :]
    views = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        third.unflatten(2, (H, Dh)),
        lepe.flatten(2).mT.contiguous().mT.unflatten(2, (H, Dh)),
    ]
    if dout == 'expanded':
        dout = torch.tensor(0.5).expand(B, L, H, Dh)
    else:
        dout = lepe.transpose(1, 2).contiguous().transpose(1, 2)
    idx = reference.partition(k, 1, None)
    actual = run(attend(idx, 1), views, dout)
    expected = run(attend(idx, 1), [q, k, v, lepe], dout.contiguous())
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_offsets_of_64_bits(monkeypatch):
    inputs = inputs_of(1, 20, 1, 16)
    idx = reference.partition(inputs[1], 2, None)
    expected = run(attend(idx, 2), inputs)
    monkeypatch.setattr(kernels, 'FAR', 1)
    for x, y in zip(run(attend(idx, 2), inputs), expected, strict=True):
        assert torch.equal(x, y)


def test_same_bits():
    inputs = inputs_of(1, 40, 1, 16)
    idx = reference.partition(inputs[1], 2, None)
    for x, y in zip(run(attend(idx, 2), inputs), run(attend(idx, 2), inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('first', [True, False])
def test_infinite_scores(first):
    """Products below all float32 are no weights, a tile of them at either end included."""
    q, k, v = inputs_of(1, 80, 1, 16, lepe=False)
    low = slice(0, 32) if first else slice(32, 80)
    q[..., 0], k[..., 0] = 1e20, 0
    k[:, low, :, 0] = -1e20
    idx = torch.arange(80, dtype=torch.int32).expand(1, 1, 80).contiguous()
    expected = run(attend(idx, 1, backend='reference'), [x.double() for x in (q, k, v)])
    assert (expected[3][:, low] == 0).all()
    assert_close(run(attend(idx, 1), [q, k, v]), expected, RATIO)


def test_nan_stays_in_its_cluster():
    inputs = inputs_of(1, 60, 2, 16)
    k = inputs[1]
    idx = reference.partition(k, 3, None)
    tokens = idx[0, 1, 20:40].long()
    k[0, tokens[5], 1] = torch.nan
    for name, x in zip(('out', 'dq', 'dk', 'dv'), run(attend(idx, 3), inputs), strict=False):
        spoilt = x.isnan().any(-1)[0]
        assert spoilt[tokens, 1].all(), name
        assert spoilt.sum() == len(tokens), name
