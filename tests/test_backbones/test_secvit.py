"""What only SecViT has: clusters, batch norms, layer scale, and its initialisation."""

import copy
from collections import Counter

import pytest
import torch
from backbone_cases import PYRAMID, build, gradients, image, randomize, step_and_count
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from visionseq_mm.backbones import SecViT


class CountedOps(TorchDispatchMode):
    """How often each of our ops ran, by its name."""

    def __enter__(self):
        self.counts = Counter()
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'visionseq_mm':
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(num_clusters=(4, 2, 1)), 'num_clusters'),
        (dict(num_clusters=(4, 2, 1, 0)), 'num_clusters'),
        (dict(num_clusters=(32, 8, 2, -1)), 'num_clusters'),
        (dict(arch={**PYRAMID, 'depths': (1, 1, 1)}), 'depths'),
        (dict(arch={**PYRAMID, 'num_heads': (3, 2, 4, 2)}), 'num_heads'),
        (dict(arch={**PYRAMID, 'embed_dims': (12, 16, 32, 32)}), 'multiple of 4'),
    ],
)
def test_bad_arguments(kwargs, word):
    with pytest.raises(ValueError, match=word):
        build('secvit', **kwargs)


def test_num_clusters():
    """A number of its own for each stage, and the same weights fit them all."""
    picture = image(64, 64)
    full = build('secvit', num_clusters=(1, 1, 1, 1)).eval()(picture)
    for stage in range(4):
        clusters = [1, 1, 1, 1]
        clusters[stage] = 2
        maps = build('secvit', num_clusters=clusters).eval()(picture)
        same = [torch.equal(a, b) for a, b in zip(maps, full, strict=True)]
        assert same == [i < stage for i in range(4)]


def test_as_many_clusters_as_tokens_at_most():
    """64 x 64 pixels have 256, 64, 16 and 4 tokens."""
    picture = image(64, 64)
    expected = build('secvit', num_clusters=(200, 64, 16, 4)).eval()(picture)
    maps = build('secvit', num_clusters=(200, 200, 200, 200)).eval()(picture)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval(norm_eval):
    model = build('secvit', norm_eval=norm_eval, out_norm=dict(type='BN'))
    for _ in range(2):  # after the constructor, and after train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 4 + 3 + 4  # stem, downsampling, outputs
        assert all(m.training != norm_eval for m in norms)
        assert model.training
        before = copy.deepcopy(dict(model.named_buffers()))
        outputs = model(image(64, 64, batch=2))
        for key, b in model.named_buffers():
            assert torch.equal(b, before[key]) == norm_eval, key
        model.eval()
        model.train()
    sum(out.square().sum() for out in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layer_scale_stands_where_the_arch_has_it():
    gammas = [key for key, _ in build('secvit').named_parameters() if 'gamma' in key]
    assert sorted({key.split('.')[1] for key in gammas}) == ['2', '3']
    assert len(gammas) == 4
    with torch.device('meta'):
        base = dict(SecViT('base').named_parameters())
        tiny = dict(SecViT('tiny').named_parameters())
    assert sum('gamma' in key for key in base) == 2 * (26 + 8)
    assert base['stages.2.blocks.0.gamma_1'].shape == (1, 320, 1, 1)
    assert not any('gamma' in key for key in tiny)


def test_features_are_those_before_the_downsampling():
    """The last stage built has none, so that a shallower model ends where its map does."""
    picture = image(64, 64)
    deep = randomize(build('secvit')).float()
    for last in range(3):
        shallow = build('secvit', out_indices=last).eval()
        state = deep.state_dict()
        shallow.load_state_dict({key: state[key] for key in shallow.state_dict()})
        assert not any(key.startswith(f'stages.{last}.downsample') for key in shallow.state_dict())
        torch.testing.assert_close(shallow(picture)[0], deep(picture)[last])


@pytest.mark.parametrize(
    ('level', 'clusters', 'attention'),
    [
        (dict(), 1, 1),
        (dict(recompute='kernel'), 1, 1),
        (dict(with_cp=True), 2, 2),
        (dict(recompute='kernel', with_cp=True), 2, 2),
    ],
)
def test_recomputation_levels(level, clusters, attention):
    """The same gradients; clusters and attention are computed again only with ``with_cp``."""
    picture = image(64, 96, batch=2, dtype=torch.float64)
    expected, kept = step_and_count(randomize(build('secvit')), picture)
    model = randomize(build('secvit', **level))
    with CountedOps() as counted:
        grads, size = step_and_count(model, picture)
    torch.testing.assert_close(grads, expected)
    blocks = sum(model.depths)
    assert counted['sec_partition'] == clusters * blocks
    assert counted['sec_attention'] == attention * blocks
    assert counted['sec_attention_backward'] == blocks
    if level:
        assert size < kept / 2


def test_recompute_with_stochastic_depth():
    """What is computed again has the masks of the first time."""
    results = []
    for recompute in ('none', 'kernel'):
        model = build('secvit', recompute=recompute, drop_path_rate=0.5)
        torch.manual_seed(1)
        results.append(gradients(model, image(64, 64, batch=4))[1])
    torch.testing.assert_close(*results)


def test_recompute_by_name():
    with pytest.raises(ValueError, match=r"recompute must be 'none' or 'kernel', got True"):
        build('secvit', recompute=True)


def test_initialisation():
    torch.manual_seed(0)
    model = SecViT(
        arch=dict(
            embed_dims=(64, 64, 64, 64),
            depths=(1, 1, 1, 1),
            num_heads=(2, 2, 2, 2),
            layer_scale=(False, False, True, True),
        ),
        out_type='cls',
    )
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4 + 4 * 7 + 3 + 1
    for conv in convs:
        # 288 samples at least: a standard error of 4 per cent.
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.17)
        assert (conv.bias == 0).all()
    for key, p in model.named_parameters():
        if 'gamma' in key:
            torch.testing.assert_close(p.data, torch.full_like(p, 1e-6))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            assert (m.weight == 1).all()
            assert (m.bias == 0).all()
