"""The adapter by itself: levels, layers and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionseq_mm.necks import MultiScaleAdapter


def maps(count=1, width=16, size=(6, 10)):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, width, *size, generator=generator) for _ in range(count))


@pytest.mark.parametrize('in_channels', [16, [16, 16, 16, 16]])
@pytest.mark.parametrize('out_channels', [None, 8])
def test_shapes(in_channels, out_channels):
    neck = MultiScaleAdapter(in_channels, out_channels)
    outs = neck(maps(4))
    assert isinstance(outs, tuple)
    channels = out_channels or 16
    sizes = [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert [tuple(out.shape) for out in outs] == [(2, channels, *size) for size in sizes]


@pytest.mark.parametrize('in_channels', [16, [16, 16, 16, 16]])
def test_which_map_feeds_which_scale(in_channels):
    neck = MultiScaleAdapter(in_channels)
    inputs = [m.requires_grad_() for m in maps(4)]
    for level, out in enumerate(neck(inputs)):
        fed_by = torch.autograd.grad(out.sum(), inputs, allow_unused=True, retain_graph=True)
        source = 3 if in_channels == 16 else level
        assert [g is not None for g in fed_by] == [i == source for i in range(4)]


def layers_of(neck):
    """Kinds and widths of the layers with parameters, in order."""
    return [
        (type(m).__name__, *m.weight.shape[:2])
        for m in neck.modules()
        if getattr(m, 'weight', None) is not None
    ]


def test_layers_of_beit():
    """Width kept, nothing after the rescaling."""
    neck = MultiScaleAdapter([16, 16, 16, 16], norm_cfg=dict(type='BN'))
    up = ('ConvTranspose2d', 16, 16)
    assert layers_of(neck) == [up, ('BatchNorm2d', 16), up, up]
    outs = neck(maps(4))
    assert torch.equal(outs[2], maps(4)[2])
    assert torch.equal(outs[3], F.max_pool2d(maps(4)[3], 2))


def test_layers_of_vitdet():
    """Width halved by each transposed convolution, then 1x1 and 3x3 without bias, with norms."""
    neck = MultiScaleAdapter(16, out_channels=8)
    norm = ('LN2d', 8)

    def project(width):
        return [('Conv2d', 8, width), norm, ('Conv2d', 8, 8), norm]

    assert layers_of(neck) == [
        ('ConvTranspose2d', 16, 8),
        norm,
        ('ConvTranspose2d', 8, 4),
        ('ConvTranspose2d', 16, 8),
        *project(4),
        *project(8),
        *project(16),
        *project(16),
    ]
    convs = [m for m in neck.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in convs] == [(1, 1), (3, 3)] * 4
    assert all(m.bias is None for m in convs)


@pytest.mark.parametrize('out_channels', [None, 8])
def test_values_of_the_largest_scale(out_channels):
    """ConvT, norm, GELU, ConvT, step by step."""
    torch.manual_seed(0)
    neck = MultiScaleAdapter(16, out_channels, scales=(4,))
    up1, up2 = (m for m in neck.modules() if isinstance(m, nn.ConvTranspose2d))
    norms = [m for m in neck.modules() if type(m).__name__ == 'LN2d']
    for norm in norms:
        nn.init.normal_(norm.weight)

    def ln(x, norm):
        return F.layer_norm(
            x.movedim(1, -1), norm.weight.shape, norm.weight, norm.bias, 1e-6
        ).movedim(-1, 1)

    (x,) = maps()
    x = F.conv_transpose2d(x, up1.weight, up1.bias, stride=2)
    x = F.conv_transpose2d(F.gelu(ln(x, norms[0])), up2.weight, up2.bias, stride=2)
    if out_channels:
        one, three = (m for m in neck.modules() if isinstance(m, nn.Conv2d))
        x = ln(F.conv2d(x, one.weight), norms[1])
        x = ln(F.conv2d(x, three.weight, padding=1), norms[2])
    torch.testing.assert_close(neck(maps())[0], x, rtol=1e-4, atol=1e-5)


def test_act_cfg():
    torch.manual_seed(0)
    gelu = MultiScaleAdapter(16, scales=(4,))
    relu = MultiScaleAdapter(16, scales=(4,), act_cfg=dict(type='ReLU'))
    relu.load_state_dict(gelu.state_dict())
    assert not torch.allclose(gelu(maps())[0], relu(maps())[0])


def test_norm_that_does_not_fit_maps():
    for out_channels in (None, 8):
        with pytest.raises(ValueError, match='LN2d'):
            MultiScaleAdapter(16, out_channels, norm_cfg=dict(type='LN'))


def test_scales():
    outs = MultiScaleAdapter(16, scales=(2, 1, 0.5, 0.25))(maps(size=(9, 14)))
    sizes = [(18, 28), (9, 14), (4, 7), (2, 3)]  # halves are rounded down
    assert [tuple(out.shape[2:]) for out in outs] == sizes
    assert torch.equal(outs[3], F.max_pool2d(maps(size=(9, 14))[0], 4))


@pytest.mark.parametrize('out_channels', [None, 8])
def test_num_outs(out_channels):
    outs = MultiScaleAdapter(16, out_channels, num_outs=6)(maps(size=(8, 9)))
    assert [tuple(out.shape[2:]) for out in outs[3:]] == [(4, 4), (2, 2), (1, 1)]
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])


def test_widths_of_their_own():
    neck = MultiScaleAdapter([8, 16], scales=(2, 0.5))
    outs = neck((torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 4, 4)))
    assert [tuple(out.shape) for out in outs] == [(1, 8, 8, 8), (1, 16, 2, 2)]


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(in_channels=[16, 16]), 'same length'),
        (dict(in_channels=16, scales=(8, 4)), '4, 2, 1, 0.5 and 0.25'),
        (dict(in_channels=16, num_outs=3), 'num_outs'),
        (dict(in_channels=18, out_channels=8), 'halved'),
    ],
)
def test_bad_arguments(kwargs, word):
    with pytest.raises(ValueError, match=word):
        MultiScaleAdapter(**kwargs)


def test_wrong_number_of_maps():
    with pytest.raises(ValueError, match='expected 4 maps'):
        MultiScaleAdapter([16, 16, 16, 16])(maps(3))


def test_unknown_keyword():
    with pytest.raises(TypeError, match='start_level'):
        MultiScaleAdapter(16, start_level=1)


def test_every_parameter_gets_a_gradient():
    for out_channels in (None, 8):
        for in_channels in (16, [16] * 4):
            neck = MultiScaleAdapter(in_channels, out_channels, num_outs=5)
            sum(out.square().sum() for out in neck(maps(4))).backward()
            assert all(p.grad is not None for p in neck.parameters())
