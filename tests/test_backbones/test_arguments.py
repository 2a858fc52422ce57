"""The arguments that all backbones share, each by its effect."""

import copy

import pytest
import torch
from backbone_cases import CASES, KINDS, PLAIN_KINDS, PYRAMIDS, build, gradients, image, randomize
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionseq_mm.backbones import SECFasterViT, SECSwin, SecViT, ViL, Vim
from visionseq_mm.layers import LN2d

LN = dict(type='visionseq_mm.LN2d', eps=1e-6)
kinds = pytest.mark.parametrize('name', KINDS)


def blocks_of(model):
    """What out_indices and frozen_stages count."""
    return model.stages if hasattr(model, 'stages') else model.blocks


# ----------------------------------------------------------------------- arch


@pytest.mark.parametrize('cls', [Vim, ViL, SecViT, SECSwin, SECFasterViT])
@pytest.mark.parametrize('arch', ['huge', {}, None, dict(embed_dims=16), dict(depth=4, width=1)])
def test_bad_arch(cls, arch):
    with pytest.raises(ValueError, match=r'arch.*embed_dims'):
        cls(arch=arch)


@pytest.mark.parametrize('name', PLAIN_KINDS)
def test_bad_sizes_in_arch(name):
    for depth in (0, -1, 4.0, '4'):
        with pytest.raises(ValueError, match='positive integers'):
            build(name, arch=dict(embed_dims=16, depth=depth))


@kinds
def test_arch_dict_is_not_changed(name):
    arch = CASES[name][1]['arch']
    before = copy.deepcopy(arch)
    build(name)
    assert arch == before


@kinds
def test_unknown_keyword(name):
    with pytest.raises(TypeError, match='patch_size'):
        build(name, patch_size=16)


# ------------------------------------------------------------------- img_size


@pytest.mark.parametrize('name', PLAIN_KINDS)
def test_img_size(name):
    assert build(name, img_size=96).pos_embed.shape == (1, 6, 6, 16)
    for size in ((64, 100), [64, 100]):  # configs hold lists
        assert build(name, img_size=size).pos_embed.shape == (1, 4, 7, 16)
    for size in (15, (64, 15), (64, 64, 64), (64,), (64.0, 64.0)):
        with pytest.raises(ValueError, match='img_size'):
            build(name, img_size=size)


def test_table_of_stride_8():
    """Vim's has the grid of the stride, ViL's a row for each 16 pixels all the same."""
    assert build('vim-stride8', img_size=224).pos_embed.shape[1:3] == (27, 27)
    assert build('vil1-stride8', img_size=224).pos_embed.shape[1:3] == (14, 14)


@pytest.mark.parametrize('name', PLAIN_KINDS)
def test_stride_is_16_or_8(name):
    for stride in (4, 14, 32):
        with pytest.raises(ValueError, match='stride'):
            build(name, stride=stride)


# ---------------------------------------------------------------- out_indices


@kinds
def test_out_indices(name):
    picture = image(48, 64)
    maps = build(name, out_indices=(0, 1, 2, 3)).eval()(picture)
    assert isinstance(maps, tuple)
    for given, same in (
        (None, (0, 1, 2, 3)),
        (2, (2,)),
        (-1, (3,)),
        ((1, -1), (1, 3)),
        ([0, 2], (0, 2)),
    ):
        model = build(name, out_indices=given).eval()
        assert model.out_indices == same
        # Deeper blocks are drawn later, so a shallower model has the same weights.
        if name not in PYRAMIDS:
            torch.testing.assert_close(model(picture), tuple(maps[i] for i in same))
        assert [m.shape for m in model(picture)] == [maps[i].shape for i in same]


@kinds
@pytest.mark.parametrize('indices', [4, -5, (0, 4), (-5,), (2, 1), (1, 1), (3, -1), ()])
def test_bad_out_indices(name, indices):
    with pytest.raises(ValueError, match='out_indices'):
        build(name, out_indices=indices)


@pytest.mark.parametrize('name', PLAIN_KINDS)
def test_default_out_indices(name):
    for depth, expected in ((4, (0, 1, 2, 3)), (7, (0, 2, 4, 6)), (12, (2, 5, 8, 11))):
        model = build(name, arch=dict(embed_dims=16, depth=depth))
        assert model.out_indices == expected
    shallow = dict(embed_dims=16, depth=3)
    with pytest.raises(ValueError, match='out_indices must be given'):
        build(name, arch=shallow)
    assert build(name, arch=shallow, out_indices=-1).out_indices == (2,)
    assert build(name, arch=shallow, out_type='cls')(image(32, 32))[0].dim() == 2


@pytest.mark.parametrize('name', [*KINDS, 'vim-stride8'])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1,), (0, 2)])
def test_only_what_is_used_is_built(name, out_indices):
    """Every parameter gets a gradient, so that DistributedDataParallel finds none unused."""
    model = build(name, out_indices=out_indices)
    _, grads = gradients(model, image(64, 64, batch=2))
    assert [key for key, grad in grads.items() if grad is None] == []
    assert len(blocks_of(model)) == out_indices[-1] + 1


# ------------------------------------------------------------------- out_type


@kinds
def test_out_type_cls(name):
    model = build(name, out_type='cls')
    outputs, grads = gradients(model, image(64, 64, batch=2))
    width = {'vim': 16, 'vil1': 16, 'secvit': 1024}.get(name, 32)
    assert isinstance(outputs, tuple)
    assert [tuple(out.shape) for out in outputs] == [(2, width)]
    assert None not in grads.values()


@kinds
def test_out_type_cls_takes_no_dense_argument(name):
    dense = [dict(out_indices=0), dict(out_indices=(3,)), dict(out_norm=LN)]
    if name == 'vim':
        dense += [dict(feature='stream'), dict(feature='branch')]
    for given in dense:
        with pytest.raises(ValueError, match=next(iter(given))):
            build(name, out_type='cls', **given)


@kinds
def test_bad_out_type(name):
    with pytest.raises(ValueError, match='out_type'):
        build(name, out_type='avg_featmap')


# ------------------------------------------------------------------- out_norm


@kinds
def test_out_norm(name):
    plain = build(name, out_indices=(1, 3)).eval()
    normed = build(name, out_indices=(1, 3), out_norm=LN).eval()
    layers = [m for m in normed.modules() if isinstance(m, LN2d)]
    extra = len(layers) - sum(isinstance(m, LN2d) for m in plain.modules())
    assert extra == 2
    for i, layer in enumerate(layers[-2:]):
        nn.init.constant_(layer.weight, 2 + i)
        nn.init.constant_(layer.bias, i)
    for i, (raw, out) in enumerate(zip(plain(image(48, 64)), normed(image(48, 64)), strict=True)):
        mean, var = raw.mean(1, keepdim=True), raw.var(1, keepdim=True, unbiased=False)
        expected = (raw - mean) / (var + 1e-6).sqrt() * (2 + i) + i
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@kinds
def test_out_norm_of_batches(name):
    model = build(name, out_norm=dict(type='BN'))
    for out in model(image(64, 64, batch=4)):
        torch.testing.assert_close(
            out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-4, rtol=0
        )


@kinds
def test_out_norm_that_does_not_fit_maps(name):
    with pytest.raises(ValueError, match='LN2d'):
        build(name, out_norm=dict(type='LN'))


# ------------------------------------------------------------- drop_path_rate


def rates_of(model):
    return [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]


@kinds
def test_drop_path_ramp(name):
    """From 0 over all layers of the arch, whether they are built or not."""
    count = {'vim': 4, 'vil1': 4, 'vil2': 8}.get(name, 5)
    ramp = [0.3 * i / (count - 1) for i in range(count)]
    assert rates_of(build(name, drop_path_rate=0.3)) == pytest.approx(ramp)
    built = {'vim': 2, 'vil1': 2, 'vil2': 4}.get(name, 3)  # a second stage has two blocks
    shallow = build(name, drop_path_rate=0.3, out_indices=(0, 1))
    assert rates_of(shallow) == pytest.approx(ramp[:built])
    assert set(rates_of(build(name))) == {0}


@kinds
def test_drop_path_drops_samples_in_training_only(name):
    model = build(name, drop_path_rate=0.5, out_indices=-1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, _BatchNorm):
                m.momentum = 0.0
    forty = image(32, 32).repeat(40, 1, 1, 1)
    torch.manual_seed(0)
    (trained,) = model(forty)
    kinds_of_output = torch.unique(trained.flatten(1).round(decimals=4), dim=0)
    assert 1 < len(kinds_of_output) < 40
    (tested,) = model.eval()(forty)
    torch.testing.assert_close(tested, tested[:1].expand_as(tested))


@kinds
@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_bad_drop_path_rate(name, rate):
    with pytest.raises(ValueError, match='drop_path_rate'):
        build(name, drop_path_rate=rate)


# -------------------------------------------------------------- frozen_stages


@kinds
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(name, frozen_stages):
    model = build(name, frozen_stages=frozen_stages, drop_path_rate=0.5, out_norm=LN)
    frozen = ['patch_embed.', 'pos_embed'] if frozen_stages >= 0 else []
    container = 'stages' if name in PYRAMIDS else 'blocks'
    frozen += [f'{container}.{i}.' for i in range(frozen_stages)]

    def is_frozen(key):
        return key.startswith(tuple(frozen))

    def check_modes():
        for key, m in model.named_modules():
            if key and key != container:
                assert m.training != is_frozen(f'{key}.'), key

    check_modes()
    model.eval()
    model.train()
    check_modes()
    before = {key: b.clone() for key, b in model.named_buffers()}
    _, grads = gradients(model, image(64, 64, batch=2))
    for key, p in model.named_parameters():
        assert p.requires_grad != is_frozen(key)
        assert (grads[key] is None) == is_frozen(key)
    for key, b in model.named_buffers():
        assert torch.equal(b, before[key]) == is_frozen(key), key


@pytest.mark.parametrize('name', KINDS)
def test_frozen_stem_of_class_vectors(name):
    """In 'cls' mode Vim's class token belongs to the stem, and the last norm to no stage."""
    model = build(name, out_type='cls', frozen_stages=0)
    frozen = {key.split('.')[0] for key, p in model.named_parameters() if not p.requires_grad}
    stem = {'patch_embed', 'pos_embed', 'cls_token', 'cls_pos_embed'}
    assert frozen == stem & {key.split('.')[0] for key, _ in model.named_parameters()}


@kinds
def test_frozen_stages_range(name):
    for frozen_stages in (-2, 5):
        with pytest.raises(ValueError, match='frozen_stages'):
            build(name, frozen_stages=frozen_stages)
    with pytest.raises(ValueError, match='frozen_stages'):
        build(name, frozen_stages=3, out_indices=(0, 1))  # only two are built


# -------------------------------------------------------------------- with_cp


@kinds
@pytest.mark.parametrize('frozen_stages', [-1, 0])
def test_recomputation_changes_no_gradient(name, frozen_stages):
    results = []
    for with_cp in (False, True):
        model = build(name, with_cp=with_cp, frozen_stages=frozen_stages, drop_path_rate=0.5)
        model.double()
        torch.manual_seed(1)  # for the masks of stochastic depth
        results.append(gradients(model, image(48, 64, batch=3, dtype=torch.float64)))
        for key, counter in model.named_buffers():
            if key.endswith('tracked'):
                frozen = frozen_stages == 0 and key.startswith('patch_embed.')
                assert counter == (0 if frozen else 1), key
    torch.testing.assert_close(results[0], results[1])
    grads = results[1][1]
    assert any(grad is not None for grad in grads.values())


@kinds
def test_recomputation_keeps_less(name):
    def kept(**level):
        model = build(name, frozen_stages=0, **level)  # the stem keeps nothing then
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes) or t, lambda t: t
        )
        with hooks:
            model(image(64, 64, batch=2))
        return sum(sizes)

    if name in PYRAMIDS:  # whose downsampling is no block, and which keeps all by default
        assert kept(with_cp=True) < kept() / 2.5
        return
    everything = kept(recompute='none')
    assert kept(with_cp=True) < everything / 20
    assert kept() < everything
    if name.startswith('vim'):  # whose mixers keep no output
        assert kept(with_cp=True) < kept() / 20


# -------------------------------------------------------- init_cfg, min_matched


@kinds
def test_init_cfg_and_min_matched(name, tmp_path):
    source = randomize(build(name)).float()
    state = source.state_dict()
    torch.save(state, tmp_path / 'whole.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'whole.pth'))
    model = build(name, seed=1, init_cfg=cfg)
    assert isinstance(model, BaseModule)
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key

    half = dict(list(state.items())[: len(state) // 2])
    torch.save(half, tmp_path / 'half.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'half.pth'))
    with pytest.raises(RuntimeError, match='missing'):
        build(name, seed=1, init_cfg=cfg).init_weights()
    lenient = build(name, seed=1, init_cfg=cfg, min_matched=0.3)
    lenient.init_weights()
    for key, tensor in half.items():
        assert torch.equal(lenient.state_dict()[key], tensor), key


@kinds
@pytest.mark.parametrize('share', [-0.1, 1.5, 95])
def test_bad_min_matched(name, share):
    with pytest.raises(ValueError, match='min_matched'):
        build(name, min_matched=share)
