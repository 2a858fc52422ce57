"""The partition of SecViT in Triton, against the reference in float64."""

from itertools import pairwise

import pytest
import torch
from ops_twins import normal

from visionseq_mm.ops import sec_partition
from visionseq_mm.ops.cluster_attention import reference
from visionseq_mm.ops.cluster_attention import triton_partition as kernels


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several programs, tiles of each, and borders that share a bin."""
    small = dict(TILE=256, CHUNK=64, BINS=32, SEARCHED=16, PROGRAMS=4)
    for name, value in small.items():
        monkeypatch.setattr(kernels, name, value)


def expected(k, K, valid=None):
    """The reference's order, ascending inside of clusters."""
    idx = reference.partition(k.double(), K, valid)
    for b in range(len(k)):
        n = k.shape[1] if valid is None else int(valid[b].sum())
        borders = [c * n // K for c in range(K + 1)] + [k.shape[1]]
        parts = idx[b].split([j - i for i, j in pairwise(borders)], -1)
        idx[b] = torch.cat([part.sort(-1).values for part in parts], -1)
    return idx


def random_keys(B, L, H, Dh):
    return (normal((B, L, H, Dh))[0] + 0.3).float()


def random_valid(B, L):
    """The last sample without a valid token, where there are several."""
    valid = torch.rand(B, L, generator=torch.Generator().manual_seed(L)) < 0.6
    if B > 1:
        valid[-1] = False
    return valid


SHAPES = [  # B, L, H, Dh, K
    (1, 1, 1, 4, 1),
    (2, 7, 2, 6, 7),
    (3, 33, 1, 4, 1),
    (3, 65, 1, 8, 4),
    (1, 300, 1, 8, 16),
    (1, 31, 1, 128, 2),
]


@pytest.mark.parametrize(
    'B, L, H, Dh, K, partly',
    [
        *((*shape, partly) for shape in SHAPES for partly in (False, True)),
        (1, 97, 1, 32, 64, True),
    ],
)
def test_equals_reference(B, L, H, Dh, K, partly):
    k, valid = random_keys(B, L, H, Dh), random_valid(B, L) if partly else None
    idx = kernels.partition(k, K, valid)
    assert idx.dtype == torch.int32 and idx.is_contiguous()
    assert torch.equal(idx, expected(k, K, valid))


def test_whole_bins(monkeypatch):
    """The sizes of a GPU, and all of a tile found in one bin."""
    monkeypatch.undo()
    k = random_keys(1, 2100, 1, 16)
    assert torch.equal(kernels.partition(k, 8, None), expected(k, 8))
    monkeypatch.setattr(kernels, 'BINS', 2)
    assert torch.equal(kernels.partition(k, 8, None), expected(k, 8))


def test_ties_by_token_index():
    keys = normal((5, 1, 16))[0].float()
    which = torch.randint(5, (1, 150), generator=torch.Generator().manual_seed(0))
    k = keys[which]
    assert torch.equal(kernels.partition(k, 7, None), expected(k, 7))
    same = kernels.partition(torch.ones(1, 100, 1, 8), 3, None)
    assert (same == torch.arange(100)).all()


def test_zeros_of_both_signs_are_equal():
    """Cosines of 1, −1, 0 and −0, the mean along the first axis."""
    k = torch.tensor([[1.0, 0], [0, 1], [-0.0, -1], [0, 1], [-0.0, -1], [-0.5, 0]])[None, :, None]
    assert kernels.partition(k, 3, None).flatten().tolist() == [1, 5, 2, 3, 0, 4]


def test_nearly_equal_cosines():
    """Neighbours among float32, many borders in a bin; their order is that of the rounded ones."""
    angles = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1
    k = torch.cat([torch.stack([angles.cos(), angles.sin()], -1), torch.tensor([[1e3, 0]])])
    mean = k.double().mean(0)
    cosine = torch.nn.functional.cosine_similarity(k.double(), mean, dim=-1)
    idx = kernels.partition(k[None, :, None], 8, None).flatten()
    assert torch.equal(idx.sort().values, torch.arange(65).int())
    parts = [cosine[idx[c * 65 // 8 : (c + 1) * 65 // 8]] for c in range(8)]
    assert all(a.max() <= b.min() + 2e-7 for a, b in pairwise(parts))


def test_nan():
    k, valid = random_keys(2, 65, 1, 8), random_valid(2, 65)
    valid[1] = True
    bad = k.masked_fill(~valid[:, :, None, None], torch.nan)
    assert torch.equal(kernels.partition(bad, 4, valid), expected(k, 4, valid))
    k[1, 7] = torch.nan  # of one valid token are the mean and all cosines of that sample
    idx = kernels.partition(k, 4, valid)
    assert torch.equal(idx[1, 0], torch.arange(65).int())
    assert torch.equal(idx[:1], expected(k, 4, valid)[:1])


def test_views_equal_copies_every_time():
    k = normal((1, 65, 3 * 2 * 8))[0].float().unflatten(2, (3, 2, 8))[:, :, 1]
    idx = kernels.partition(k, 4, None)
    assert torch.equal(idx, kernels.partition(k.contiguous(), 4, None))
    assert torch.equal(idx, kernels.partition(k.mT.contiguous().mT, 4, None))
    half = k.half()
    assert torch.equal(kernels.partition(half, 4, None), expected(half, 4))


def test_public_function():
    k = random_keys(1, 33, 2, 8)
    assert torch.equal(sec_partition(k, 4, backend='triton'), expected(k, 4))


def test_too_many_tokens():
    with pytest.raises(ValueError, match='below 2³¹, got 67108864 · 32'):
        kernels.partition(torch.empty(1, 2**26, 1, 4, device='meta'), 32, None)
