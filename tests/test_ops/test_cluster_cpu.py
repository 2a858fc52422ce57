"""What only Numba's cluster attention has: blocks, parts of clusters, threads, its own sort."""

import pytest
import torch
from ops_twins import LargestTensor, assert_close, normal
from torch.nn.functional import normalize

from visionseq_mm.ops.cluster_attention import reference

cpu = pytest.importorskip('visionseq_mm.ops.cluster_attention.cpu')

PRECISION = {torch.float32: 2e-6, torch.float64: 1e-13}


def inputs(L, H=1, Dh=8, dtype=torch.float32, B=1):
    """dout, q, k, v and lepe; v is a view with strides, dout expanded."""
    *rest, v, dout = normal(*[(B, L, H, Dh)] * 3, (B, L, 3, H, Dh), (B, 1, 1, Dh))
    return [x.to(dtype) for x in (dout.expand(B, L, H, Dh), *rest[:2], v[:, :, 2], rest[2])]


def run(module, dout, q, k, v, lepe, idx, K, valid=None):
    """Output, what is kept, and gradients."""
    out, attended, sums = module.forward(q, k, v, idx, K, valid, lepe, True)
    grads = module.backward(dout, q, k, v, idx, attended, sums, K, valid)
    return [out, attended, sums, *grads]


def compare(xs, K, valid=None, ratio=None):
    idx = reference.partition(xs[2], K, valid)
    actual = run(cpu, *xs, idx, K, valid)
    wide = [x.double() for x in xs]
    expected = run(reference, *wide, idx, K, valid)
    assert [x.dtype for x in actual] == [xs[0].dtype] * 2 + [actual[2].dtype] + [xs[0].dtype] * 3
    assert_close(actual, expected, ratio or PRECISION[xs[0].dtype])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('count', [1, 15, 17, 63, 65, 95, 97, 193])
def test_around_the_borders_of_blocks(count, dtype):
    """Vectors, tiles of keys, and blocks of queries that are full, short of one, one too long."""
    compare(inputs(2 * count + 1, H=2, dtype=dtype), 2)


@pytest.mark.parametrize('Dh', [1, 16, 24, 40])
def test_widths_of_heads(Dh):
    compare(inputs(130, Dh=Dh), 2)


@pytest.mark.parametrize('L', [300, 2000])
def test_one_cluster_in_parts(L):
    """Its keys shared out, and the shares of dq added."""
    xs = inputs(L, Dh=8)
    _, (*_, parts) = cpu._clusters(torch.empty(1, 1, L, dtype=torch.int32), 1, None)
    assert parts == min(cpu.TASKS, L // cpu.KEYS)
    compare(xs, 1, ratio=5e-6)


def test_fewer_tokens_than_clusters_or_parts():
    valid = torch.zeros(3, 700, dtype=torch.bool)
    valid[0, 5:9] = True
    valid[1] = True
    compare(inputs(700, B=3, dtype=torch.float64), 2, valid)
    compare(inputs(700, B=3, dtype=torch.float64), 9, valid)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    ratio = 1e-2 if dtype == torch.bfloat16 else 2e-3
    compare(inputs(200, H=2, dtype=dtype), 3, ratio=ratio)


def test_large_scores():
    """Far beyond what an exponential without the row's maximum bears."""
    dout, q, k, v, lepe = inputs(300, H=2)
    compare([dout, 100 * q, k, v, lepe], 2, ratio=1e-4)


def test_what_is_not_kept():
    _, q, k, v, lepe = inputs(65)
    idx = cpu.partition(k, 2, None)
    out, attended, _ = cpu.forward(q, k, v, idx, 2, None, lepe, True)
    torch.testing.assert_close(out, attended + lepe, rtol=0, atol=0)
    without = cpu.forward(q, k, v, idx, 2, None, lepe, False)
    torch.testing.assert_close(without[0], out, rtol=0, atol=0)
    assert without[2] is None
    alone = cpu.forward(q, k, v, idx, 2, None, None, True)
    assert alone[1] is alone[0]
    torch.testing.assert_close(alone[0], attended, rtol=0, atol=0)


@pytest.mark.parametrize(('L', 'H', 'K'), [(520, 3, 4), (1100, 1, 1)])
def test_same_bits_on_any_number_of_threads(L, H, K):
    xs, results = inputs(L, H), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        idx = cpu.partition(xs[2], K, None)
        results.append([idx, *run(cpu, *xs, idx, K)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_memory_is_linear_in_a_long_cluster():
    """Of the tensors, and of the kernels' own scratch."""
    for L in (256, 16384):  # the first for what Python and the compiler need
        xs = inputs(L)
        before = resident()
        with LargestTensor() as mode:
            idx = cpu.partition(xs[2], 1, None)
            run(cpu, *xs, idx, 1)
    assert mode.elements <= cpu.TASKS * L * 16
    assert resident() - before < L * L  # a quarter of a matrix of weights


def resident():
    """The most bytes that this process ever had in memory."""
    resource = pytest.importorskip('resource')
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_invalid_tokens_may_hold_anything():
    xs = inputs(200, H=2, B=2)
    xs[0] = xs[0].contiguous()
    valid = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.6
    away = ~valid[:, :, None, None]
    bad = [x.masked_fill(away, torch.nan) for x in xs]
    results = []
    for tensors in (xs, bad):
        idx = cpu.partition(tensors[2], 3, valid)
        results.append([idx, *run(cpu, *tensors, idx, 3, valid)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ------------------------------------------------------------------------ order


@pytest.mark.parametrize('L', [1, 15, 16, 17, 1000])
def test_order_equals_the_references(L):
    """In float64 no two cosines are near enough for their rounding to matter."""
    k = normal((3, L, 2, 6))[0]
    valid = torch.rand(3, L, generator=torch.Generator().manual_seed(0)) < 0.6
    valid[0] = False
    for mask in (None, valid):
        actual = cpu.partition(k, 1, mask)
        assert actual.dtype == torch.int32
        torch.testing.assert_close(actual, reference.partition(k, 1, mask))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_order_is_that_of_the_cosines(dtype):
    k = normal((2, 1000, 2, 20))[0].to(dtype)
    idx = cpu.partition(k, 1, None).long()
    k = k.double()
    cosine = (normalize(k, dim=-1) * normalize(k.mean(1, keepdim=True), dim=-1)).sum(-1)
    assert cosine.transpose(1, 2).gather(2, idx).diff().min() > -1e-6


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_zeros_and_nan(dtype):
    """Opposite zeros tie; NaN of either sign come last of the valid tokens, by index."""
    k = torch.zeros(1, 40, 1, 4, dtype=dtype)
    k[0, :, 0, 0] = torch.tensor([1.0, -1.0]).repeat(20)  # a mean of 0, and cosines of ±0
    assert (cpu.partition(k, 1, None)[0, 0] == torch.arange(40)).all()
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[0, [3, 7]] = False
    k[0, 11, 0, 1], k[0, 5, 0, 1] = torch.nan, -torch.tensor(torch.nan)
    rest = [t for t in range(40) if t not in (3, 7)]
    assert cpu.partition(k, 1, valid)[0, 0].tolist() == [*rest, 3, 7]  # the mean is NaN


def test_one_cosine_that_overflows():
    """A key's square is infinite; the others stand as in the reference."""
    k = normal((1, 40, 1, 4))[0].float()
    k[0, 9] = 3e38
    orders = [module.partition(k, 1, None)[0, 0].tolist() for module in (cpu, reference)]
    assert sorted(orders[0]) == list(range(40))
    for order in orders:
        order.remove(9)
    assert orders[0] == orders[1]
