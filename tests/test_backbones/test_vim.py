"""What only Vim has: class tokens, readouts, features, and its initialisation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import build, gradients, image, loss_of, randomize, step_and_count
from backbone_twins import (
    affine,
    causal_conv_twin,
    map_twin,
    rms_norm,
    stem_twin,
    vim_direction,
    vim_mixer_twin,
)

from visionseq_mm.backbones import Vim


def test_bad_arguments():
    for kwargs in (
        dict(cls_token='tail'),
        dict(cls_token=True),
        dict(cls_token=None, pooling='cls'),
        dict(feature='residual'),
    ):
        with pytest.raises(ValueError, match=list(kwargs)[-1]):
            build('vim', **kwargs)


@pytest.mark.parametrize('cls_token', ['middle', 'head', 'double'])
@pytest.mark.parametrize('pooling', ['mean', 'max'])
def test_pooling_needs_a_model_without_class_token(cls_token, pooling):
    with pytest.raises(ValueError, match='pooling'):
        build('vim', cls_token=cls_token, pooling=pooling, out_type='cls')


def test_pooling_is_mean_by_default():
    picture = image(48, 64)
    outputs = [
        build('vim', cls_token=None, pooling=pooling, out_type='cls')(picture)
        for pooling in (None, 'mean', 'max')
    ]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert (outputs[2][0] > outputs[1][0]).all()


@pytest.mark.parametrize('cls_token', ['middle', 'head', 'double', None])
def test_dense_features_have_no_class_token(cls_token):
    model = build('vim', cls_token=cls_token)
    assert {key.split('.')[0] for key in model.state_dict()} == {
        'patch_embed',
        'pos_embed',
        'blocks',
    }
    torch.testing.assert_close(model(image(48, 64)), build('vim')(image(48, 64)), rtol=0, atol=0)


@pytest.mark.parametrize(('cls_token', 'count'), [('middle', 1), ('head', 1), ('double', 2)])
def test_class_tokens_have_positions_of_their_own(cls_token, count):
    state = build('vim', cls_token=cls_token, out_type='cls').state_dict()
    assert state['cls_token'].shape == state['cls_pos_embed'].shape == (1, count, 16)
    assert state['pos_embed'].shape == (1, 4, 4, 16)


def test_feature_is_the_stream_by_default():
    picture = image(48, 64)
    stream, branch = (build('vim', feature=f)(picture) for f in ('stream', 'branch'))
    torch.testing.assert_close(build('vim')(picture), stream, rtol=0, atol=0)
    for before, after, added in zip(stream, stream[1:], branch[1:], strict=False):
        torch.testing.assert_close(after, before + added)


def test_branches_leave_no_parameter_without_gradient():
    model = build('vim', feature='branch', out_indices=(0, 2))
    sum(out.square().sum() for out in model(image(48, 64))).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_features_of_a_branch_are_not_dropped():
    """Stochastic depth acts on what is added to the stream, not on what is returned of it."""
    torch.manual_seed(0)
    model = build('vim', feature='branch', out_indices=0, drop_path_rate=0.9)
    model.blocks[0].drop_path.drop_prob = 0.9
    (branch,) = model(image(32, 32, batch=8))
    assert (branch.flatten(1).abs().sum(1) > 0).all()


def test_backward_direction_is_the_forward_one_of_the_flipped_sequence():
    """With exchanged weights, that is; and z belongs to the token, not to the direction."""
    mixer = randomize(build('vim')).blocks[1].mixer
    exchanged = copy.deepcopy(mixer)
    names = [('conv1d', 'conv1d_b'), ('x_proj', 'x_proj_b'), ('dt_proj', 'dt_proj_b')]
    names += [('A_log', 'A_b_log'), ('D', 'D_b')]
    for a, b in names:
        setattr(exchanged, a, getattr(mixer, b))
        setattr(exchanged, b, getattr(mixer, a))
    tokens = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(exchanged(tokens.flip(1)).flip(1), mixer(tokens))
    assert not torch.allclose(mixer(tokens.flip(1)).flip(1), mixer(tokens))


# ---------------------------------------------------------- directional designs

DESIGNS = ('none', 'layer', 'ssm', 'ssm_conv')
designs = pytest.mark.parametrize('design', DESIGNS)


def design_twin(block, tokens, design, index):
    """The mixer of a block from one direction after the other."""
    m = block.mixer
    x, z = affine(tokens, m.in_proj).chunk(2, -1)
    own = m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D
    if design == 'none' or (design == 'layer' and index % 2 == 0):
        y = vim_direction(x, z, *own)
    elif design == 'layer':
        y = vim_direction(x.flip(1), z.flip(1), *own).flip(1)
    elif design == 'ssm_conv':
        return vim_mixer_twin(m, tokens)
    else:
        # One convolution and projection; the second scan runs from the other end of them.
        u = F.silu(causal_conv_twin(x, m.conv1d))
        dt, B, C = affine(u, m.x_proj).split([m.dt_rank, 16, 16], -1)
        inputs = u, F.softplus(affine(dt, m.dt_proj)), B, C
        y = scan_steps(*inputs, -m.A_log.exp(), m.D)
        y = y + scan_steps(*(t.flip(1) for t in inputs), -m.A_b_log.exp(), m.D).flip(1)
        y = y / 2 * F.silu(z)
    return affine(y, m.out_proj)


def scan_steps(u, delta, B, C, A, D):
    h, ys = 0, []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = (step * A).exp() * h + step * B[:, t, None, :] * u[:, t, :, None]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1)


@designs
def test_design_equals_twin(design):
    model = randomize(build('vim', bidirectional=design))
    picture = image(48, 80, dtype=torch.float64)
    maps, grads = gradients(model, picture)
    assert None not in grads.values()

    def twin(picture):
        residual = stem_twin(model, picture, 16).flatten(1, 2)
        streams = []
        for i, block in enumerate(model.blocks):
            hidden = rms_norm(residual, block.norm.weight)
            residual = residual + design_twin(block, hidden, design, i)
            streams.append(map_twin(residual, (3, 5)))
        return streams

    model.zero_grad()
    expected = twin(picture)
    loss_of(expected).backward()
    torch.testing.assert_close(maps, tuple(expected))
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)


@designs
def test_what_a_token_sees(design):
    """Everything with two directions, what stands before it with one."""
    model = randomize(build('vim', bidirectional=design, out_indices=(0, 3)))
    picture = image(16, 96, dtype=torch.float64)
    other = picture.clone()
    other[..., 48:64] += 1  # the fourth of six tokens
    changed = [
        (a - b).abs().sum((0, 1, 2)) > 0 for a, b in zip(model(picture), model(other), strict=True)
    ]
    one_way = [False, False, False, True, True, True]
    whole = [True] * 6
    expected = dict(none=(one_way, one_way), layer=(one_way, whole)).get(design, (whole, whole))
    assert [x.tolist() for x in changed] == list(expected)


@pytest.mark.parametrize(('design', 'suffixed'), [('none', 0), ('layer', 0), ('ssm', 1)])
def test_designs_share_parameters(design, suffixed):
    mixer = build('vim', bidirectional=design).blocks[1].mixer
    names = {name for name, _ in mixer.named_parameters()}
    assert sum('_b' in name for name in names) == suffixed
    full = {name for name, _ in build('vim').blocks[1].mixer.named_parameters()}
    assert names < full
    assert sum('_b' in name for name in full) == 7  # two of conv1d and dt_proj, x_proj, A, D


def test_design_and_level_by_name():
    with pytest.raises(ValueError, match=r"bidirectional must be 'none', .* got 'v2'"):
        build('vim', bidirectional='v2')
    with pytest.raises(ValueError, match=r"recompute must be 'none' or 'kernel', got True"):
        build('vim', recompute=True)


@designs
def test_recomputation_levels(design):
    """The same gradients, and the less kept the more is computed again."""
    picture = image(512, 512)
    results, kept = [], []
    for level in (dict(recompute='none'), dict(), dict(with_cp=True)):
        grads, size = step_and_count(build('vim', bidirectional=design, **level), picture)
        results.append(grads)
        kept.append(size)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    none, kernel, block = kept
    # Of a block alone the stream is kept, beside the image and what the stem needs.
    assert none - block > 4 * (kernel - block) > 0


# -------------------------------------------------------------- initialisation


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Vim(arch=dict(embed_dims=192, depth=4), out_type='cls')


def test_initial_stem(model):
    # As timm 0.4.12 draws LeCun's normal: 1 / sqrt(fan in) over 0.8796.
    std = model.patch_embed.proj.weight.std().item()
    assert std == pytest.approx(768**-0.5 / 0.87962566, rel=0.02)
    assert (model.patch_embed.proj.bias == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for p in (model.cls_token, model.cls_pos_embed):
        assert p.std().item() == pytest.approx(0.02, rel=0.2)


def test_initial_step_sizes(model):
    for block in model.blocks:
        m = block.mixer
        step = F.softplus(m.dt_proj.bias)
        assert 1e-3 * 0.999 < step.min() < 2e-3
        assert 0.05 < step.max() < 0.1 * 1.001
        # Log-uniform: the median is the geometric mean.
        assert step.median().item() == pytest.approx(1e-2, rel=0.35)
        assert (m.dt_proj_b.bias == 0).all()
        for weight in (m.dt_proj.weight, m.dt_proj_b.weight):
            bound = 12**-0.5
            assert 0.98 * bound < weight.abs().max() <= bound


def test_initial_states(model):
    expected = torch.arange(1.0, 17).log().expand(384, 16)
    for block in model.blocks:
        m = block.mixer
        assert torch.equal(m.A_log, expected)
        assert torch.equal(m.A_b_log, expected)
        assert (m.D == 1).all()
        assert (m.D_b == 1).all()
        assert (block.norm.weight == 1).all()


def test_initial_projections(model):
    """PyTorch's bounds, and out_proj's over the square root of the depth."""
    for block in model.blocks:
        m = block.mixer
        for linear, bound in (
            (m.in_proj, 192**-0.5),
            (m.x_proj, 384**-0.5),
            (m.x_proj_b, 384**-0.5),
            (m.out_proj, 384**-0.5 / math.sqrt(4)),
        ):
            assert linear.bias is None
            assert 0.99 * bound < linear.weight.abs().max() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_initial_directions_differ(model):
    m = model.blocks[0].mixer
    for a, b in ((m.conv1d, m.conv1d_b), (m.x_proj, m.x_proj_b), (m.dt_proj, m.dt_proj_b)):
        assert not torch.equal(a.weight, b.weight)
