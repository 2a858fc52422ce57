"""What only ViL has: two versions, alternating directions, and its initialisation."""

import math

import pytest
import torch
from backbone_cases import PLAIN, build, image, randomize
from mmcv.cnn.bricks import DropPath

from visionseq_mm.backbones import ViL


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(version=3), 'version'),
        (dict(arch='tinyplus'), 'version 1'),
        (dict(arch='smallplus'), 'version 1'),
        (dict(arch='tiny', stride=8), 'version 1'),
        (dict(arch=dict(embed_dims=15, depth=4)), 'even'),
    ],
)
def test_bad_arguments(kwargs, word):
    with pytest.raises(ValueError, match=word):
        ViL(**kwargs)


def test_depth_counts_pairs_in_version_2():
    for version, layers in ((1, 4), (2, 8)):
        model = ViL(arch=PLAIN, version=version)
        assert len(model.blocks) == 4
        assert len([m for m in model.modules() if isinstance(m, DropPath)]) == layers


@pytest.mark.parametrize('version', [1, 2])
def test_drop_path_decay(version):
    model = ViL(arch=PLAIN, version=version, drop_path_rate=0.2, drop_path_decay=False)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == [0.2] * 4 * version


@pytest.mark.parametrize('version', [1, 2])
def test_directions_alternate(version):
    """With the same weights, every second layer is the first one of the flipped sequence."""
    model = randomize(build(f'vil{version}'))
    tokens = torch.randn(2, 15, 16, dtype=torch.float64)
    hw = (3, 5)
    if version == 1:
        layers = list(model.blocks)
    else:
        pairs = [(p.rowwise_from_top_left, p.rowwise_from_bot_right) for p in model.blocks]
        layers = [layer for pair in pairs for layer in pair]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    there = layers[0](tokens, hw)
    back = layers[0](tokens.flip(1), hw).flip(1)
    assert not torch.allclose(there, back)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(layer(tokens, hw), back if i % 2 else there)


def test_convolution_of_version_2_knows_the_grid():
    """A token reaches its eight neighbours on a grid of any width, and no others."""
    model = randomize(build('vil2', out_indices=0))
    layer = model.blocks[0].rowwise_from_top_left.layer
    tokens = torch.zeros(1, 4 * 7, 32, dtype=torch.float64)
    tokens[0, 2 * 7 + 3] = 1  # row 2, column 3 of 4 x 7
    moved = (layer.conv(tokens, (4, 7), False) - layer.conv.bias).abs().sum(-1)[0] > 0
    places = moved.unflatten(0, (4, 7)).nonzero().tolist()
    assert places == [[r, c] for r in (1, 2, 3) for c in (2, 3, 4)]


@pytest.mark.parametrize('version', [1, 2])
def test_features_are_in_raster_order(version):
    """Raw: neither flipped nor normed after the last block, whichever direction it has."""
    model = build(f'vil{version}')
    with torch.no_grad():
        for key, p in model.named_parameters():
            if 'proj_down' in key:
                p.zero_()
    maps = model(image(48, 64))
    expected = model.embed(image(48, 64)).permute(0, 3, 1, 2)
    for out in maps:
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


# -------------------------------------------------------------- initialisation


@pytest.fixture(scope='module', params=[1, 2])
def model(request):
    torch.manual_seed(0)
    arch = dict(embed_dims=192, depth=4 // request.param)
    return ViL(arch=arch, version=request.param, out_type='cls')


def named(model, ending):
    tensors = [p for key, p in model.named_parameters() if key.endswith(ending)]
    assert tensors
    return tensors


def test_initial_stem(model):
    weight = model.patch_embed.proj.weight
    bound = math.sqrt(6 / (768 + 192))  # Xavier's, as a linear layer
    assert 0.99 * bound < weight.abs().max() <= bound
    assert (model.patch_embed.proj.bias == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_initial_projections(model):
    small = math.sqrt(2 / (5 * 192))
    for ending, std in (
        ('proj_up.weight', small),
        ('q_proj.weight', small),
        ('k_proj.weight', small),
        ('v_proj.weight', small),
        ('proj_down.weight', 2 / math.sqrt(192)),
    ):
        for p in named(model, ending):
            assert p.std().item() == pytest.approx(std, rel=0.06), ending


def test_initial_gates(model):
    for p in named(model, 'igate.weight') + named(model, 'fgate.weight'):
        assert (p == 0).all()
    for p in named(model, 'fgate.bias'):
        torch.testing.assert_close(p.data, torch.tensor([3.0, 4.0, 5.0, 6.0]))
    biases = torch.cat(named(model, 'igate.bias'))
    assert 0.04 < biases.std().item() < 0.2
    assert biases.abs().max() < 0.5


def test_initial_norms_and_biases(model):
    """Gains of the norms are stored less one, but for the last norm, a plain one."""
    zeros = ('norm.weight', 'norm.bias', 'proj.bias', 'proj_up.bias', 'proj_down.bias')
    for key, p in model.named_parameters():
        if key == 'pool_norm.weight' or key.endswith('learnable_skip'):
            assert (p == 1).all(), key
        elif key.endswith(zeros):
            assert (p == 0).all(), key


def test_biases_by_version(model):
    with_bias = {key.split('.')[-2] for key, _ in model.named_parameters() if '.bias' in key}
    everywhere = {'proj_up', 'proj_down', 'q_proj', 'k_proj', 'v_proj', 'outnorm', 'norm'}
    assert with_bias >= {'igate', 'fgate', 'conv'}
    assert with_bias & everywhere == (everywhere if model.version == 2 else set())
