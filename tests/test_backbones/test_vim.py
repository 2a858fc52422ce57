"""What only Vim has: class tokens, readouts, features, and its initialisation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import build, image, randomize

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
