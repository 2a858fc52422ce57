"""Cluster maps, against the clusters of keys that are computed here from the layers' inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionseq_mm.analysis.cluster_maps import cluster_maps
from visionseq_mm.backbones import SECFasterViT, SECSwin, SecViT, Vim
from visionseq_mm.backbones.sec_swin import ClusterMSA
from visionseq_mm.ops import rotary_2d
from visionseq_mm.ops.cluster_attention import cluster_labels

pytestmark = pytest.mark.usefixtures('one_thread', 'nothing_to_compile')

HEADS, CLUSTERS = (2, 2, 4, 2), (5, 3, 2, 1)
ARCH = dict(
    embed_dims=(16, 16, 32, 32), depths=(1, 2, 2, 1), num_heads=HEADS, layer_scale=(False,) * 4
)


@pytest.fixture
def nothing_to_compile(monkeypatch):
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')


def build(cls=SecViT, **kwargs):
    torch.manual_seed(0)
    arch = {key: ARCH[key] for key in cls.arch_zoo['tiny']}
    model = cls(**{**dict(arch=arch, num_clusters=CLUSTERS), **kwargs}).double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return model


def image(height, width, batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def keys_of(attn, x):
    """(h, w, H, Dh) of one image; SEC-Swin has no rotary embedding."""
    if isinstance(attn, ClusterMSA):
        return attn.qkv(x).chunk(3, dim=3)[1][0].unflatten(2, (attn.num_heads, -1))
    keys = attn.qkv(x).chunk(3, dim=1)[1].permute(0, 2, 3, 1).unflatten(3, (attn.num_heads, -1))
    return rotary_2d(keys, keys)[0][0]


def clusters_of(attn, x, valid=None):
    """Members of each cluster of one image: [head][cluster] -> set of (row, column)."""
    keys = keys_of(attn, x)
    places = [(i, j) for i in range(keys.shape[0]) for j in range(keys.shape[1])]
    if valid is not None:
        places = [place for place in places if valid[place]]
    n, K = len(places), attn.num_clusters
    found = []
    for head in range(attn.num_heads):
        k = torch.stack([keys[place][head] for place in places])
        order = F.cosine_similarity(k, k.mean(0, keepdim=True), dim=1).argsort().tolist()
        borders = [c * n // K for c in range(K + 1)]
        found.append([{places[p] for p in order[borders[c] : borders[c + 1]]} for c in range(K)])
    return found


def inputs_of(model, picture, stage, block):
    """The attention of a block and the map that it gets."""
    attn, inputs = model.stages[stage - 1].blocks[block].attn, []
    with torch.no_grad(), attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        model(picture)
    return attn, inputs[0]


def assert_clusters(labels, attn, x, valid=None):
    """``labels`` (heads, h, w) are the clusters that ``attn`` makes of the map ``x``."""
    for head, members in enumerate(clusters_of(attn, x, valid)):
        for cluster, expected in enumerate(members):
            found = (labels[head] == cluster).nonzero().tolist()
            assert {tuple(place) for place in found} == expected


@torch.no_grad()
@pytest.mark.parametrize('cls', [SecViT, SECSwin])
@pytest.mark.parametrize(
    'stage, block, size',
    [
        (1, 0, (36, 52)),  # 9 x 13 tokens in 5 clusters
        (2, -1, (36, 52)),  # 5 x 7 in 3
        (2, 0, (36, 52)),
        (3, 1, (36, 52)),  # 3 x 4 in 2
        (3, -2, (20, 52)),  # 2 x 4
    ],
)
def test_clusters_are_those_of_the_keys(cls, stage, block, size):
    model, picture = build(cls), image(*size)
    maps = cluster_maps(model, picture, [stage], block)
    (labels,) = maps[stage]
    attn, x = inputs_of(model, picture, stage, block)
    assert list(maps) == [stage]
    assert labels.shape == (HEADS[stage - 1], *(-(-n // 2 ** (stage + 1)) for n in size))
    assert_clusters(labels, attn, x)


@torch.no_grad()
def test_padding_is_in_no_cluster():
    """Of an image of 30 x 41 pixels among 36 x 52."""
    model = build(mask_padding=True)
    picture = torch.cat([image(36, 52, batch=2), torch.ones(2, 1, 36, 52)], dim=1)
    picture[1, 3, 30:] = picture[1, 3, :, 41:] = 0
    for stage, (whole, padded) in cluster_maps(model, picture).items():
        assert whole.min() == 0
        h, w = (-(-n // 2 ** (stage + 1)) for n in (30, 41))
        valid = torch.zeros(whole.shape[1:], dtype=torch.bool)
        valid[:h, :w] = True
        assert not valid.all()
        assert torch.equal(padded >= 0, valid.expand_as(padded))
        attn, x = inputs_of(model, picture, stage, -1)
        assert_clusters(padded, attn, x[1:], valid)


def test_batch_is_its_images():
    model, pictures = build(), image(36, 52, batch=2)
    together = cluster_maps(model, pictures)
    alone = [cluster_maps(model, picture[None]) for picture in pictures]
    assert list(together) == [1, 2, 3]
    for stage, labels in together.items():
        assert torch.equal(labels, torch.cat([maps[stage] for maps in alone]))


@pytest.mark.parametrize('tokens', [7, 8, 12, 13])
@pytest.mark.parametrize('K', [1, 3, 8, 12])
def test_labels_have_the_ops_borders(tokens, K):
    """Fewer valid tokens than clusters, and none, included."""
    B, H, L = 3, 2, 13
    counts = torch.tensor([L, tokens, 0])
    valid = torch.arange(L) < counts[:, None]
    idx = torch.stack([torch.randperm(L) for _ in range(B * H)]).view(B, H, L)
    idx = idx.gather(2, (idx >= counts[:, None, None]).int().argsort(dim=2, stable=True))
    expected = torch.full((B, H, L), -1)
    for b, n in enumerate(counts.tolist()):
        for c in range(K):
            for h in range(H):
                expected[b, h, idx[b, h, c * n // K : (c + 1) * n // K]] = c
    assert torch.equal(cluster_labels(idx.int(), K, valid), expected)
    assert torch.equal(cluster_labels(idx[:1].int(), K), expected[:1])


def test_stages_of_convolutions():
    model, picture = SECFasterViT(out_indices=2).eval(), image(36, 52).float()
    assert list(cluster_maps(model, picture)) == [3]
    with pytest.raises(ValueError, match=r'stage 2 of this SECFasterViT has no clusters.*: 3$'):
        cluster_maps(model, picture, [2, 3])


def test_full_attention_everywhere():
    with pytest.raises(ValueError, match='no stage of this SecViT has clusters'):
        cluster_maps(build(num_clusters=(1, 1, 1, 1)), image(36, 52))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(stages=[1, 4]), 'stage 4 of this SecViT has no clusters.*: 1, 2, 3'),
        (dict(stages=[0]), r'from 1 to 4 here, got \[0\]'),
        (dict(stages=[1, 5]), r'from 1 to 4 here, got \[1, 5\]'),
        (dict(block=1), 'blocks of stage 1 .* -1 to 0, got 1'),
        (dict(stages=[2], block=-3), 'blocks of stage 2 .* -2 to 1, got -3'),
    ],
)
def test_what_there_is_not(kwargs, message):
    with pytest.raises(ValueError, match=message):
        cluster_maps(build(), image(36, 52), **kwargs)


def test_stages_that_are_not_built():
    with pytest.raises(ValueError, match=r'from 1 to 2 here, got \[1, 2, 3\]'):
        cluster_maps(build(out_indices=1), image(36, 52), [1, 2, 3])


def test_backbone_without_clusters():
    with pytest.raises(TypeError, match='Vim has no clusters'):
        cluster_maps(Vim(arch=dict(embed_dims=16, depth=4), img_size=32), image(32, 32))


def test_model_is_left_as_it_was():
    model = build()
    cluster_maps(model, image(36, 52))
    assert not any(stage._forward_pre_hooks for stage in model.stages)
    assert not any(p.grad is not None for p in model.parameters())
    assert model(image(36, 52))[0].requires_grad
