"""SEC-Swin and SEC-FasterViT beside the backbones that lend them their structure."""

import re

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import SEC_FASTERVIT, SEC_SWIN, build, gradients, image, randomize
from mmpretrain.models.backbones import SwinTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionseq_mm.backbones import SECFasterViT, SECSwin, sec_swin
from visionseq_mm.checkpoints import CheckpointMismatchError

HOSTS = ('sec-swin', 'sec-fastervit')
hosts = pytest.mark.parametrize('name', HOSTS)


def count(parameters):
    return sum(p.numel() for p in parameters)


def on_meta(cls, *args, **kwargs):
    with torch.device('meta'):
        return cls(*args, **kwargs)


# ----------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ('arch', 'dense', 'plain'),
    [('tiny', 27_494_496, 27_519_354), ('small', 48_788_064, 48_837_258)],
)
def test_parameters_of_sec_swin(arch, dense, plain):
    """Those of Swin but for the tables of position biases."""
    swin = SwinTransformer(arch)  # its last norm, of what 'cls' pools, among them
    tables = [p for key, p in swin.named_parameters() if key.endswith('bias_table')]
    assert count(swin.parameters()) == plain
    ours = on_meta(SECSwin, arch, out_type='cls')
    assert count(ours.parameters()) == plain - count(tables)
    assert count(on_meta(SECSwin, arch).parameters()) == dense == plain - count(tables) - 2 * 768
    assert ours.num_features == 768


def lost_by_fastervit(dims, depths, heads):
    """What of FasterViT's last two stages has no place in clusters.

    Position MLPs of two inputs and 512 hidden units, one to the width and one to the heads, in
    each block; in stage 3 a second attention, MLP, pair of norms and position MLPs, for the
    carrier tokens, and the depth-wise convolution that makes these.
    """

    def positions(d, h):
        return 2 * (3 * 512) + 512 * d + 512 * h

    carriers = 12 * dims[2] ** 2 + 13 * dims[2] + positions(dims[2], heads[0])
    own = sum(n * positions(d, h) for n, d, h in zip(depths[2:], dims[2:], heads, strict=True))
    return own + depths[2] * carriers + 10 * dims[2]


@pytest.mark.parametrize(
    ('arch', 'dense', 'plain'),
    [('tiny', 23_123_776, 31_404_840), ('small', 38_426_688, 53_366_696)],
)
def test_parameters_of_sec_fastervit(arch, dense, plain):
    """``plain`` is FasterViT-0 and -1 with a head of 1000 classes, 31.4 M and 53.4 M."""
    ours = on_meta(SECFasterViT, arch, out_type='cls')
    zoo = SECFasterViT.arch_zoo[arch]
    lost = lost_by_fastervit(zoo['embed_dims'], zoo['depths'], zoo['num_heads'])
    head = 1000 * ours.num_features + 1000
    assert count(ours.parameters()) + head == plain - lost
    assert count(on_meta(SECFasterViT, arch).parameters()) == dense
    assert dense + 2 * ours.num_features == plain - lost - head


@pytest.mark.parametrize(
    ('cls', 'arch', 'expected'),
    [
        (SECSwin, 'tiny', 4_622_564_352),
        (SECSwin, 'small', 8_961_383_424),
        (SECFasterViT, 'tiny', 3_233_592_320),
        (SECFasterViT, 'small', 5_043_804_416),
    ],
)
def test_multiply_adds(cls, arch, expected, monkeypatch):
    """At 224x224, those of the READMEs."""
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    model = on_meta(cls, arch, out_type='cls').eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() == 2 * expected


def test_head_dims():
    found = {
        (cls.__name__, arch): {m.qkv.in_features // m.num_heads for m in attentions(cls, arch)}
        for cls in (SECSwin, SECFasterViT)
        for arch in cls.arch_zoo
    }
    assert found == {
        ('SECSwin', 'tiny'): {32},
        ('SECSwin', 'small'): {32},
        ('SECFasterViT', 'tiny'): {32},
        ('SECFasterViT', 'small'): {40},
    }


def attentions(cls, arch):
    return [m for m in on_meta(cls, arch).modules() if isinstance(m, sec_swin.ClusterMSA)]


# ------------------------------------------------------------------ structure


def test_sec_swin_of_one_cluster_is_swin_of_one_window():
    """The same tensors in mmpretrain's Swin, where windows cover the maps and biases are 0."""
    windows = (7, 4, 2, 1)  # of 26 x 28 pixels: patches and their merging meet odd sizes
    swin = SwinTransformer(
        arch=dict(embed_dims=16, depths=[2, 1, 2, 1], num_heads=[1, 2, 4, 8]),
        out_indices=(0, 1, 2, 3),
        stage_cfgs=[dict(block_cfgs=dict(window_size=n)) for n in windows],
    )
    randomize(swin)
    with torch.no_grad():
        for key, p in swin.named_parameters():
            if key.endswith('bias_table'):
                p.zero_()
    for m in swin.modules():
        if hasattr(m, 'shift_size'):
            m.shift_size = 0
    arch = dict(embed_dims=(16, 32, 64, 128), depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8))
    ours = SECSwin(
        arch=arch, num_clusters=(1, 1, 1, 1), out_norm=dict(type='visionseq_mm.LN2d', eps=1e-5)
    )
    ours.double().eval()
    state = swin.state_dict()
    norms = {
        f'out_norms.{i}.{w}': state.pop(f'norm{i}.{w}')
        for i in range(4)
        for w in ('weight', 'bias')
    }
    ours.load_state_dict({**state, **norms}, strict=True)
    picture = image(26, 28, batch=2, dtype=torch.float64)
    with torch.no_grad():
        expected = swin(picture)
        torch.testing.assert_close(ours(picture), expected, rtol=1e-12, atol=1e-12)
        vector = SECSwin(arch=arch, num_clusters=(1, 1, 1, 1), out_type='cls').double().eval()
        last = {f'norm3.{w}': norms[f'out_norms.3.{w}'] for w in ('weight', 'bias')}
        vector.load_state_dict({**state, **last}, strict=True)
        pooled = expected[3].mean((2, 3))
        torch.testing.assert_close(vector(picture), (pooled,), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ('name', 'size', 'used'),
    [
        ('sec-swin', (128, 96), [(32, 768), *[(8, 192)] * 2, (2, 48), (1, 12)]),
        ('sec-swin', (16, 9), [(12, 12), *[(4, 4)] * 2, (1, 1), (1, 1)]),
        ('sec-fastervit', (128, 96), [(2, 48), (1, 12)]),
        ('sec-fastervit', (16, 9), [(1, 1), (1, 1)]),
    ],
)
def test_clusters_of_each_stage(name, size, used, monkeypatch):
    """By default (32, 8, 2, 1), FasterViT's last two of these, and never more than tokens."""
    seen = []

    def spy(q, k, v, num_clusters, valid):
        seen.append((num_clusters, q.shape[1]))
        return attend(q, k, v, num_clusters, valid)

    attend = sec_swin.cluster_attention
    monkeypatch.setattr(sec_swin, 'cluster_attention', spy)
    cls, arch = (SECSwin, SEC_SWIN) if name == 'sec-swin' else (SECFasterViT, SEC_FASTERVIT)
    with torch.no_grad():
        cls(arch=arch)(image(*size))
    assert seen == used


@hosts
def test_features_are_those_before_the_downsampling(name):
    picture = image(64, 48)
    deep = randomize(build(name)).float()
    for last in range(3):
        shallow = build(name, out_indices=last).eval()
        shallow.load_state_dict(deep.state_dict(), strict=True)  # leaves the rest out
        assert not any(f'stages.{last}.downsample' in key for key in shallow.state_dict())
        torch.testing.assert_close(shallow(picture)[0], deep(picture)[last])


# -------------------------------------------------------------------- padding


@hosts
@pytest.mark.parametrize('padding', [0.0, torch.nan], ids=str)
def test_features_do_not_depend_on_padding(name, padding):
    model = randomize(build(name, mask_padding=True))
    vector = randomize(build(name, mask_padding=True, out_type='cls'))
    sizes = (43, 70), (64, 33)
    batch = torch.zeros(2, 4, 80, 96, dtype=torch.float64)
    batch[:, :3] = padding
    for i, (height, width) in enumerate(sizes):
        batch[i, :3, :height, :width] = image(height, width, seed=i, dtype=torch.float64)[0]
        batch[i, 3, :height, :width] = 1
    together, vectors = model(batch), vector(batch)[0]
    for i, (height, width) in enumerate(sizes):
        alone = batch[i : i + 1, :, :height, :width]
        for one, padded in zip(model(alone), together, strict=True):
            expected = F.pad(
                one, (0, padded.shape[3] - one.shape[3], 0, padded.shape[2] - one.shape[2])
            )
            torch.testing.assert_close(padded[i : i + 1], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(vectors[i : i + 1], vector(alone)[0], rtol=1e-10, atol=1e-10)


@hosts
def test_mask_of_an_unpadded_image_changes_nothing(name):
    picture = image(43, 70, dtype=torch.float64)
    marked = torch.cat([picture, torch.ones_like(picture[:, :1])], dim=1)
    found = randomize(build(name, mask_padding=True))(marked)
    torch.testing.assert_close(found, randomize(build(name))(picture), rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------- recomputation


@hosts
def test_recompute_changes_no_gradient(name):
    """Nor the statistics of batch norms; ``with_cp`` has the test of all backbones."""
    results, buffers = [], []
    for recompute in ('none', 'kernel'):
        model = build(name, recompute=recompute, drop_path_rate=0.5, mask_padding=True).double()
        pictures = image(48, 64, batch=3, dtype=torch.float64)
        valid = torch.ones_like(pictures[:, :1])
        valid[1, :, 40:] = 0
        torch.manual_seed(1)
        results.append(gradients(model, torch.cat([pictures, valid], 1)))
        buffers.append(dict(model.named_buffers()))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*buffers)


@pytest.mark.parametrize('frozen_stages', [-1, 1])
def test_recomputed_batch_norms_count_a_batch_once(frozen_stages):
    """Their statistics are those without recomputation, to the last bit."""
    buffers = []
    for with_cp in (False, True):
        model = build('sec-fastervit', with_cp=with_cp, frozen_stages=frozen_stages)
        before = {key: b.clone() for key, b in model.named_buffers()}
        gradients(model, image(48, 64, batch=2))
        buffers.append(dict(model.named_buffers()))
        changed = {key.split('.')[1] for key, b in buffers[-1].items() if (b != before[key]).any()}
        assert changed == ({'norm1', 'norm2', '0', '1'} if frozen_stages < 0 else {'1'})
    torch.testing.assert_close(*buffers, rtol=0, atol=0)


# ------------------------------------------------- arguments, initial weights


@pytest.mark.parametrize(
    ('name', 'kwargs', 'message'),
    [
        ('sec-swin', dict(num_clusters=(2, 1)), r'num_clusters needs 4 values.*\(2, 1\)'),
        ('sec-swin', dict(num_clusters=(8, 4, 2, 0)), 'num_clusters must be integers of at least'),
        ('sec-swin', dict(arch={**SEC_SWIN, 'depths': (1, 1)}), 'depths needs 4 values'),
        (
            'sec-swin',
            dict(arch={**SEC_SWIN, 'num_heads': (3, 2, 4, 2)}),
            'num_heads, got 16 and 3',
        ),
        ('sec-swin', dict(recompute=True), "'none' or 'kernel', got True"),
        ('sec-fastervit', dict(num_clusters=(32, 8, 2, 1)), 'num_clusters needs 2 values'),
        (
            'sec-fastervit',
            dict(arch={**SEC_FASTERVIT, 'num_heads': (2, 2, 4, 2)}),
            'num_heads needs 2 values',
        ),
        (
            'sec-fastervit',
            dict(arch={**SEC_FASTERVIT, 'stem_dims': (8, 8)}),
            r'stem_dims needs a number, got \(8, 8\)',
        ),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(name, **kwargs)


def test_norm_eval():
    model = build('sec-fastervit', norm_eval=True, out_type='cls')
    for _ in range(2):  # after the constructor, and after train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 2 + 2 * 3 + 1  # stem, convolutional blocks, before the pooling
        assert not any(m.training for m in norms)
        assert model.training
        model.train()
    assert all(m.training for m in build('sec-fastervit').modules())


@hosts
def test_initialisation(name):
    """As Swin and FasterViT: linear layers at 0.02, convolutions as torch draws them."""
    model = build(name, out_type='cls')
    for key, m in model.named_modules():
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.2), key
            assert m.bias is None or (m.bias == 0).all(), key
        elif isinstance(m, nn.Conv2d):
            bound = m.weight[0].numel() ** -0.5
            assert 0.8 * bound < m.weight.abs().max() <= bound, key
        elif isinstance(m, nn.LayerNorm | nn.BatchNorm2d):
            assert (m.weight == 1).all(), key
            assert (m.bias == 0).all(), key


# ---------------------------------------------------------- Swin's checkpoints


@pytest.fixture(scope='module')
def swin_weights():
    """{name: tensor} of a small classifier's backbone, as mmpretrain names them."""
    arch = dict(embed_dims=16, depths=[1, 2, 1, 1], num_heads=[2, 2, 4, 2])
    return randomize(SwinTransformer(arch=arch)).float().state_dict()


ARCH = dict(embed_dims=(16, 32, 64, 128), depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 2))


def loaded(weights, **kwargs):
    model = SECSwin(arch=ARCH, **kwargs)
    model.load_state_dict(weights, strict=True)
    return model


def test_swin_loads(swin_weights, tmp_path):
    """All but position biases, of files of classifiers and of backbones, new and old."""
    for key, tensor in loaded(swin_weights, out_type='cls').state_dict().items():
        theirs = key.replace('.attn.', '.attn.w_msa.').replace('final_norm', 'norm3')
        assert torch.equal(tensor, swin_weights[theirs]), key
    dense = loaded(swin_weights, out_indices=(0, 2))
    assert {key.split('.')[1] for key in dense.state_dict() if key[0] == 's'} == {'0', '1', '2'}
    old = {re.sub('^norm3', 'norm', key): tensor for key, tensor in swin_weights.items()}
    old |= {'head.weight': torch.ones(2, 128), 'stages.1.blocks.1.attn.attn_mask': torch.ones(2)}
    assert torch.equal(loaded(old, out_type='cls').final_norm.weight, swin_weights['norm3.weight'])

    file = {f'backbone.{key}': tensor for key, tensor in swin_weights.items()}
    torch.save(dict(state_dict={**file, 'head.fc.bias': torch.ones(3)}), tmp_path / 'swin.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth'), prefix='backbone')
    model = SECSwin(arch=ARCH, init_cfg=init_cfg)
    model.init_weights()
    for (key, tensor), other in zip(
        model.state_dict().items(), loaded(swin_weights).state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), key


def test_other_checkpoints_are_refused(swin_weights):
    """Another depth; and names of Microsoft's files, whose merged patches have another order."""
    shallow = {k: v for k, v in swin_weights.items() if '.blocks.1.' not in k}
    microsoft = {
        k.replace('stages.', 'layers.')
        .replace('w_msa.', '')
        .replace('ffn.layers.0.0', 'mlp.fc1'): v
        for k, v in swin_weights.items()
    }
    for weights in (shallow, microsoft):
        with pytest.raises(CheckpointMismatchError, match=r'(?s)SECSwin.*missing'):
            loaded(weights)
