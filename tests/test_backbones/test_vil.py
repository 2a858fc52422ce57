"""What only ViL has: two versions, traversals, poolings, and its initialisation."""

import math

import pytest
import torch
from backbone_cases import PLAIN, build, gradients, image, loss_of, randomize, step_and_count
from backbone_twins import vil_twin
from mmcv.cnn.bricks import DropPath

from visionseq_mm.backbones import ViL
from visionseq_mm.backbones.vil import POOLINGS, TRAVERSALS
from visionseq_mm.checkpoints import CheckpointMismatchError

SINGLE = ('forward', 'alternating', 'alternating_quad')
SHARED = ('bidirectional_shared', 'quad_shared')
SEPARATE = ('bidirectional', 'quad')
#: Two blocks or two pairs; four where the cycle of directions has four layers.
SMALL = {
    (version, traversal): dict(
        arch=dict(embed_dims=16, depth=4 // version if traversal == 'alternating_quad' else 2),
        traversal=traversal,
    )
    for version in (1, 2)
    for traversal in (*SINGLE, *SHARED, *SEPARATE)
}
versions = pytest.mark.parametrize('version', [1, 2])
traversals = pytest.mark.parametrize('traversal', (*SINGLE, *SHARED, *SEPARATE))


def small(version, traversal, **kwargs):
    """With all blocks as outputs, unless told."""
    settings = SMALL[version, traversal]
    if kwargs.get('out_type') != 'cls':
        kwargs.setdefault('out_indices', tuple(range(settings['arch']['depth'])))
    return build(f'vil{version}', **settings, **kwargs)


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


@versions
def test_drop_path_decay(version):
    model = ViL(arch=PLAIN, version=version, drop_path_rate=0.2, drop_path_decay=False)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == [0.2] * 4 * version


@versions
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
    """Without cells, a token reaches its eight neighbours on any grid, and no others."""
    layer = randomize(build('vil2', out_indices=0)).blocks[0].rowwise_from_top_left.layer
    with torch.no_grad():
        layer.v_proj.weight.zero_()
        layer.v_proj.bias.zero_()
        tokens = torch.randn(1, 4 * 7, 16, dtype=torch.float64)
        other = tokens.clone()
        other[0, 2 * 7 + 3] += 1  # row 2, column 3 of 4 x 7
        moved = (layer(tokens, (4, 7)) - layer(other, (4, 7))).abs().sum(-1)[0] > 1e-12
    places = moved.unflatten(0, (4, 7)).nonzero().tolist()
    assert places == [[r, c] for r in (1, 2, 3) for c in (2, 3, 4)]


@versions
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


# ------------------------------------------------------------------ traversals

PICTURE = image(37, 75, dtype=torch.float64)  # 3 x 5 tokens, some padded


@traversals
@versions
def test_traversal_equals_twin(version, traversal):
    model = randomize(small(version, traversal))
    maps, grads = gradients(model, PICTURE)
    assert [tuple(out.shape) for out in maps] == [(1, 16, 3, 5)] * len(model.blocks)
    model.zero_grad(set_to_none=True)
    expected, _ = vil_twin(model, PICTURE, version, traversal=traversal)
    loss_of(expected).backward()
    torch.testing.assert_close(maps, tuple(expected), rtol=1e-7, atol=1e-7)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            grads[name] / scale, p.grad / scale, rtol=1e-7, atol=1e-7, msg=name
        )


@versions
def test_traversals_differ(version):
    """With the same weights, so that each of them must do something."""
    outputs = [
        randomize(small(version, traversal, out_indices=-1))(PICTURE)[0]
        for traversal in ('forward', 'alternating', *SHARED)
    ]
    if version == 2:  # as many layers as this one has
        outputs.append(randomize(small(2, 'alternating_quad', out_indices=-1))(PICTURE)[0])
    for i, out in enumerate(outputs):
        assert not any(torch.allclose(out, other) for other in outputs[:i])


@versions
def test_default_traversal_is_alternating(version):
    given, default = (build(f'vil{version}', **kw) for kw in (dict(traversal='alternating'), {}))
    torch.testing.assert_close(given(image(48, 64)), default(image(48, 64)), rtol=0, atol=0)


@pytest.mark.parametrize(('traversal', 'count'), [('bidirectional', 2), ('quad', 4)])
@versions
def test_separate_directions_have_weights_of_their_own(version, traversal, count):
    one = {name: p.shape for name, p in small(version, 'alternating').named_parameters()}
    model = small(version, traversal)
    all_of_them = {name: p.shape for name, p in model.named_parameters()}
    more = {name: shape for name, shape in all_of_them.items() if name not in one}
    assert one.items() <= all_of_them.items()
    expected = {}
    for name, shape in one.items():
        if '.layer.' in name and '.layer.proj_' not in name:
            for i in range(count - 1):
                expected[name.replace('.layer.', f'.layer.other_directions.{i}.')] = shape
    assert more == expected
    layer = next(m for m in model.modules() if hasattr(m, 'other_directions'))
    for other in layer.other_directions:
        assert not torch.equal(other.conv.weight, layer.conv.weight)
        assert not torch.equal(other.q_proj.weight, layer.q_proj.weight)


@pytest.mark.parametrize('traversal', SINGLE + SHARED)
@versions
def test_one_set_of_weights_for_each_layer(version, traversal):
    depth = SMALL[version, traversal]['arch']
    names = small(version, traversal).state_dict().keys()
    assert names == build(f'vil{version}', arch=depth, out_indices=-1).state_dict().keys()


@pytest.mark.parametrize('traversal', SEPARATE)
@versions
def test_weights_of_one_direction_do_not_fit_several(version, traversal):
    source = small(version, 'alternating')
    state = source.state_dict()
    with pytest.raises(CheckpointMismatchError, match=r'missing .*other_directions'):
        small(version, traversal).load_state_dict(state)
    model = small(version, traversal, seed=1, min_matched=0.2)
    result = model.load_state_dict(state, strict=False)
    assert all('other_directions' in name for name in result.missing_keys)
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize('name', ['traversal', 'pooling'])
@pytest.mark.parametrize('value', ['diagonal', True, ''])
def test_unknown_names(name, value):
    choices = TRAVERSALS if name == 'traversal' else POOLINGS
    with pytest.raises(ValueError, match=f"{name} must be one of '.*got {value!r}") as error:
        build('vil2', out_type='cls', **{name: value})
    assert all(repr(choice) in str(error.value) for choice in choices)


def test_forward_is_causal():
    """In version 1; the convolution of version 2 sees the next row, other traversals the rest."""
    other = PICTURE.clone()
    other[..., 32:, 64:] += 1  # the last of 3 x 5 tokens
    for version, traversal, expected in (
        (1, 'forward', 1),
        (2, 'forward', 15),
        (1, 'alternating', 15),
        (1, 'bidirectional', 15),
    ):
        model = randomize(small(version, traversal, out_indices=-1))
        (a,), (b,) = model(PICTURE), model(other)
        moved = ((a - b).abs().sum(1) > 0).flatten()
        assert moved[-1]
        assert moved.sum() == expected, (version, traversal)


# -------------------------------------------------------------------- symmetry

SYMMETRIES = dict(
    turn=lambda x: x.flip(-1, -2),
    transpose=lambda x: x.transpose(-1, -2),
    mirror=lambda x: x.flip(-1),
)


def symmetric(model, operation):
    """No positions, and patches that do not change where the image's pixels are rearranged."""
    with torch.no_grad():
        model.pos_embed.zero_()
        weight = model.patch_embed.proj.weight
        weight.copy_((weight + operation(weight)) / 2)
    return model


@pytest.mark.parametrize(
    ('traversal', 'guaranteed'),
    [
        ('forward', ()),
        ('alternating', ()),
        ('alternating_quad', ()),
        ('bidirectional', ()),
        ('bidirectional_shared', ('turn',)),
        ('quad', ()),
        ('quad_shared', ('turn', 'transpose')),
    ],
)
@versions
def test_equivariance(version, traversal, guaranteed):
    """Whatever the layers' own weights are, kernels included."""
    picture = image(32, 64, dtype=torch.float64)  # of whole patches: padding breaks it
    for name, operation in SYMMETRIES.items():
        model = symmetric(randomize(small(version, traversal, out_indices=-1)), operation)
        (out,), (other,) = model(picture), model(operation(picture))
        assert torch.allclose(other, operation(out), rtol=1e-7, atol=1e-7) == (name in guaranteed)


# --------------------------------------------------------------- recomputation


@pytest.mark.parametrize('traversal', ['alternating', 'quad', 'quad_shared'])
@versions
def test_recomputation_levels(version, traversal):
    """The same gradients, and the less kept the more is computed again."""
    picture = image(256, 256)
    results, kept = [], []
    for level in (dict(recompute='none'), dict(), dict(with_cp=True)):
        grads, size = step_and_count(small(version, traversal, **level), picture)
        results.append(grads)
        kept.append(size)
    assert None not in results[0]
    # Float32, whose rounding depends on the order of the sums.
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())
    none, kernel, block = kept
    # Of a block alone the stream is kept, beside the image and what the stem needs.
    assert none - block > 3 * (kernel - block) > 0


def test_recompute_by_name():
    with pytest.raises(ValueError, match=r"recompute must be 'none' or 'kernel', got True"):
        build('vil2', recompute=True)


@pytest.mark.parametrize(
    ('version', 'kwargs'),
    [
        (1, dict(traversal='bidirectional', out_type='cls', pooling='middle_cls')),
        (2, dict(traversal='quad_shared', recompute='none')),
    ],
)
def test_compiled_as_one_graph(version, kwargs, monkeypatch):
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    if 'out_type' not in kwargs:
        kwargs = dict(out_indices=0, **kwargs)
    model = build(f'vil{version}', arch=dict(embed_dims=16, depth=1), **kwargs)
    outputs, grads = gradients(model, image(48, 80))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    found, found_grads = gradients(compiled, image(48, 80))
    torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(
            found_grads[f'_orig_mod.{name}'], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item()
        )


# --------------------------------------------------------------------- pooling


@pytest.mark.parametrize('size', [(37, 75), (64, 48)])  # 15 and 12 tokens
@pytest.mark.parametrize(
    ('version', 'pooling'),
    [(v, p) for v in (1, 2) for p in (None, *POOLINGS) if (v, p) != (2, 'middle_cls')],
)
def test_pooling_equals_twin(version, pooling, size):
    model = randomize(small(version, 'alternating', out_type='cls', pooling=pooling))
    picture = image(*size, batch=2, dtype=torch.float64)
    outputs, grads = gradients(model, picture)
    assert None not in grads.values()
    assert ('cls_token' in grads) == (pooling == 'middle_cls')
    _, expected = vil_twin(model, picture, version, pooling=pooling)
    wide = pooling == 'bilateral_concat' or (pooling is None and version == 2)
    assert expected.shape == (2, 32 if wide else 16)
    torch.testing.assert_close(outputs, (expected,), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(('length', 'place'), [(1, 1), (2, 1), (3, 2), (4, 2), (15, 8)])
def test_class_token_is_found_where_it_was_put(length, place):
    """After the first half of the patches, which with an odd number is the larger one."""
    model = build('vil1', out_type='cls', pooling='middle_cls')
    with torch.no_grad():
        model.cls_token.fill_(7)
    tokens = torch.randn(2, length, 16)
    sequence = model.insert_cls(tokens)
    assert torch.equal(sequence[:, place], torch.full((2, 16), 7.0))
    assert torch.equal(sequence[:, [i for i in range(length + 1) if i != place]], tokens)
    assert torch.equal(model.pool(sequence), sequence[:, place])


@pytest.mark.parametrize('traversal', ['forward', 'bidirectional', 'bidirectional_shared'])
@pytest.mark.parametrize('with_cp', [False, True])
def test_class_token_in_traversals_by_rows(traversal, with_cp):
    arguments = dict(out_type='cls', pooling='middle_cls', with_cp=with_cp)
    model = randomize(small(1, traversal, **arguments))
    outputs, grads = gradients(model, PICTURE)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    _, expected = vil_twin(model, PICTURE, 1, traversal=traversal, pooling='middle_cls')
    torch.testing.assert_close(outputs, (expected,), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ('version', 'traversal'),
    [(2, 'alternating'), (2, 'forward'), (1, 'quad'), (1, 'quad_shared'), (1, 'alternating_quad')],
)
def test_class_token_needs_a_sequence(version, traversal):
    with pytest.raises(ValueError, match=r'no grid.*version=1.*by rows'):
        small(version, traversal, out_type='cls', pooling='middle_cls')


@pytest.mark.parametrize('pooling', POOLINGS)
@versions
def test_maps_take_no_pooling(version, pooling):
    with pytest.raises(ValueError, match=f"featmap.*pooling='{pooling}' has no effect"):
        build(f'vil{version}', pooling=pooling)


def test_dense_features_of_a_model_with_class_token():
    """Its file has more than the dense model, which leaves that out."""
    source = randomize(build('vil1', out_type='cls', pooling='middle_cls')).float()
    model = build('vil1')
    model.load_state_dict(source.state_dict())
    for name, p in model.named_parameters():
        assert torch.equal(p, source.state_dict()[name])


def test_class_token_belongs_to_the_stem():
    model = build('vil1', out_type='cls', pooling='middle_cls', frozen_stages=0)
    assert not model.cls_token.requires_grad


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


def test_initial_class_token():
    arch = dict(embed_dims=768, depth=1)
    torch.manual_seed(0)
    model = ViL(arch=arch, version=1, out_type='cls', pooling='middle_cls')
    assert model.cls_token.shape == (1, 1, 768)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.1)


def test_initial_directions():
    """The others are drawn as the first one."""
    torch.manual_seed(0)
    model = ViL(arch=dict(embed_dims=192, depth=1), traversal='quad', out_indices=0)
    layer = model.blocks[0].rowwise_from_top_left.layer
    assert len(layer.other_directions) == 3
    for other in layer.other_directions:
        for m in (other.q_proj, other.k_proj, other.v_proj):
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 192)), rel=0.06)
        assert (other.mlstm_cell.igate.weight == 0).all()
        assert torch.equal(other.mlstm_cell.fgate.bias.data, torch.tensor([3.0, 4.0, 5.0, 6.0]))
        assert (other.learnable_skip == 1).all()


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


@versions
@pytest.mark.parametrize('traversal', ['alternating', 'alternating_quad', 'quad'])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_a_trace_follows_the_image_size(version, traversal):
    model = small(version, traversal).eval()
    trace = torch.jit.trace(model, image(48, 80), check_trace=False)
    for size in ((64, 48), (96, 160), (16, 32)):
        torch.testing.assert_close(trace(image(*size)), model(image(*size)))
