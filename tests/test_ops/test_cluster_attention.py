import pytest
import torch
import torch.nn.functional as F
from ops_twins import (
    LargestTensor,
    assert_close,
    cluster_inputs,
    cluster_twin,
    normal,
    partition_twin,
    run,
)

from visionseq_mm.ops import cluster_attention, sec_attention, sec_partition
from visionseq_mm.ops.cluster_attention import reference
from visionseq_mm.ops.dispatch import INSTALLED


@pytest.fixture(autouse=True, params=['reference', *['cpu'] * INSTALLED['numba']])
def backend(request, monkeypatch):
    """Of every call that names none."""
    monkeypatch.setenv('VISIONSEQ_BACKEND', request.param)
    return request.param


def random_valid(B, L):
    """The first sample whole, the second without a valid token, the others in parts."""
    valid = torch.rand(B, L, generator=torch.Generator().manual_seed(L)) < 0.6
    valid[0] = True
    valid[1] = False
    return valid


def samples(B, L):
    """q, k, v and lepe."""
    return normal(*[(B, L, 2, 4)] * 4)


def attention(K, valid=None):
    """`cluster_attention` of tensors alone."""
    return lambda q, k, v, lepe: cluster_attention(q, k, v, K, valid, lepe=lepe)


@pytest.mark.parametrize(('L', 'K'), [(1, 1), (7, 7), (64, 4), (65, 4), (63, 32), (200, 7)])
@pytest.mark.parametrize('partly', [False, True])
def test_equals_twin(L, K, partly):
    inputs = samples(4, L)
    valid = random_valid(4, L) if partly else None
    clusters, order = partition_twin(inputs[1], K, valid)
    idx = sec_partition(inputs[1], K, valid)
    assert idx.dtype == torch.int32
    for (b, h, c), tokens in clusters.items():
        n = L if valid is None else int(valid[b].sum())
        assert sorted(idx[b, h, c * n // K : (c + 1) * n // K].tolist()) == sorted(tokens)
        assert (idx[b, h, n:] == order[b, h, n:]).all()
    twin = run(lambda q, k, v, lepe: cluster_twin(q, k, v, K, valid, lepe), inputs)
    assert_close(run(attention(K, valid), inputs), twin, 1e-12)


@pytest.mark.parametrize('partly', [False, True])
def test_backward_of_a_graph_made_without_gradients(partly, backend):
    """As after a trace: what the backward needs was not kept, and is computed then."""
    inputs, valid = samples(4, 65), random_valid(4, 65) if partly else None
    expected = run(attention(5, valid), inputs)
    idx = sec_partition(inputs[1], 5, valid)

    def op(q, k, v, lepe):
        registered = torch.ops.visionseq_mm.sec_attention
        return registered(q, k, v, idx, 5, valid, lepe, False, backend)[0]

    torch.testing.assert_close(run(op, inputs), expected)


def test_one_cluster_is_attention():
    q, k, v, _ = cluster_inputs(65)
    full = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(cluster_attention(q, k, v, 1), full.transpose(1, 2))


def test_as_many_clusters_as_tokens():
    q, k, v, _ = cluster_inputs(9)
    torch.testing.assert_close(cluster_attention(q, k, v, 9), v)


def test_ties_by_token_index():
    """Equal keys have equal cosines wherever they stand, and keep their order."""
    k = normal((5, 3, 32))[0].float()
    which = torch.randint(5, (2, 999), generator=torch.Generator().manual_seed(0))
    idx = sec_partition(k[which], 4).long()
    sorted_keys = which[:, None].expand(2, 3, 999).gather(2, idx)
    same = sorted_keys[..., 1:] == sorted_keys[..., :-1]
    assert same.sum() == 2 * 3 * (999 - 5)
    assert (idx.diff() > 0)[same].all()
    assert (sec_partition(torch.ones(1, 50, 2, 8), 3) == torch.arange(50)).all()


def test_partition_ignores_scale():
    k = cluster_inputs(200)[1]
    torch.testing.assert_close(sec_partition(k / 8, 4), sec_partition(k, 4))


def test_partition_is_at_least_float32():
    k = cluster_inputs(200)[1].bfloat16()
    torch.testing.assert_close(sec_partition(k, 4), sec_partition(k.float(), 4))
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(sec_partition(k.float(), 4), sec_partition(k.float(), 4))


def test_token_order_does_not_matter():
    inputs = cluster_inputs(200)[:3]
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    expected = cluster_attention(*inputs, 7)[:, shuffle]
    torch.testing.assert_close(cluster_attention(*(x[:, shuffle] for x in inputs), 7), expected)


def test_order_inside_a_cluster_does_not_matter():
    q, k, v, _ = cluster_inputs(64)
    idx = sec_partition(k, 4)
    other = idx.view(2, 3, 4, 16).flip(3).reshape_as(idx)
    torch.testing.assert_close(sec_attention(q, k, v, other, 4), sec_attention(q, k, v, idx, 4))


def test_invalid_tokens():
    """Zero output and gradients, and no effect on any other token."""
    B, L, K = 4, 65, 4
    inputs = samples(B, L)
    valid = random_valid(B, L)
    fill = valid[:, :, None, None]
    noise = [torch.where(fill, x, 1e3 * torch.randn_like(x)) for x in inputs]

    op = attention(K, valid)
    actual = run(op, inputs)
    for x, other in zip(actual, run(op, noise), strict=True):
        assert (x[~valid] == 0).all()
        torch.testing.assert_close(x[valid], other[valid], rtol=0, atol=0)
    bad = [x.masked_fill(~fill, torch.nan) for x in inputs]
    torch.testing.assert_close(run(op, bad), actual, rtol=0, atol=0)


def test_padding_equals_no_padding():
    inputs = samples(2, 65)
    padded = [F.pad(x, (0, 0, 0, 0, 0, 35), value=7.0) for x in inputs]
    valid = (torch.arange(100) < 65).expand(2, 100)
    torch.testing.assert_close(attention(4, valid)(*padded)[:, :65], attention(4)(*inputs))


def test_all_valid_is_no_mask():
    inputs = samples(2, 65)
    valid = torch.ones(2, 65, dtype=torch.bool)
    actual, expected = (run(attention(4, mask), inputs) for mask in (valid, None))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('valid', [None, random_valid(4, 65)], ids=['whole', 'valid'])
def test_registration(valid, backend):
    *qkv, lepe = (x.requires_grad_() for x in samples(4, 65))
    ops = torch.ops.visionseq_mm
    torch.library.opcheck(ops.sec_partition.default, (qkv[1].detach(), 4, valid, backend))
    idx = sec_partition(qkv[1], 4, valid)
    for extra, keep in ((lepe, True), (lepe, False), (None, True)):
        args = (*qkv, idx, 4, valid, extra, keep, backend)
        torch.library.opcheck(ops.sec_attention.default, args)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_memory_is_linear_in_a_long_cluster(dtype):
    """No attention matrix of a whole cluster, forward or backward."""
    q, k, v = (x.to(dtype) for x in normal(*[(1, 4096, 1, 8)] * 3))
    idx = sec_partition(k, 1)
    with LargestTensor() as mode:
        out, *kept = reference.forward(q, k, v, idx, 1, None, None, True)
        reference.backward(out, q, k, v, idx, *kept, 1, None)
    assert mode.elements <= 4096 * 4096 // 8


def test_bad_arguments():
    q, k, v, _ = cluster_inputs(7)
    idx = sec_partition(k, 2)
    for op in (
        lambda K: sec_partition(k, K),
        lambda K: sec_attention(q, k, v, idx, K),
        lambda K: cluster_attention(q, k, v, K),
    ):
        for K in (0, 8):
            with pytest.raises(ValueError, match=f'between 1 and the 7 tokens, got {K}'):
                op(K)
        for K in (2.0, '2', None, True):
            with pytest.raises(ValueError, match=f'num_clusters must be an integer, got {K!r}'):
                op(K)
    for valid in (torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 7)):
        with pytest.raises(ValueError, match=r'valid must be \(B, L\) = \(2, 7\), bool'):
            cluster_attention(q, k, v, 2, valid)
    for bad in (idx.long(), idx[:1], idx.mT):
        with pytest.raises(ValueError, match=r'idx must be \(B, H, L\) = \(2, 3, 7\), int32'):
            sec_attention(q, k, v, bad, 2)


@pytest.mark.parametrize('number', [-1, 7, 10**9])
def test_order_of_numbers_that_are_no_tokens(number):
    q, k, v, _ = cluster_inputs(7)
    idx = sec_partition(k, 2)
    idx[1, 2, 3] = number
    with pytest.raises(ValueError, match=rf'tokens from 0 to 6, got numbers from .*{number}'):
        sec_attention(q, k, v, idx, 2)


def test_what_triton_does_not_take(monkeypatch):
    """By name it raises, before any kernel is built; the others have no such limits."""
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    q, k, v, _ = normal(*[(1, 70, 1, 132)] * 4)
    with pytest.raises(ValueError, match='at most 128 channels, got Dh = 132'):
        cluster_attention(q.float(), k.float(), v.float(), 2, backend='triton')
    q, k, v = (x[..., :4].float() for x in (q, k, v))
    for op in (
        lambda: sec_partition(k, 65, backend='triton'),
        lambda: sec_attention(q, k, v, sec_partition(k, 65), 65, backend='triton'),
    ):
        with pytest.raises(ValueError, match='at most 64 clusters, got 65'):
            op()
    assert cluster_attention(q, k, v, 65).isfinite().all()
