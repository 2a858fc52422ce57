"""Every published name, with the number of parameters of the official model."""

import pytest
import torch

from visionseq_mm.backbones import SecViT, ViL, Vim

#: (class, arguments, official count with a head of 1000 classes, of the dense backbone). Where the
#: official backbone's count includes what dense features have no use for (Vim's class token, its
#: position and the last norm: 3 D), that is subtracted here.
COUNTS = [
    (Vim, dict(arch='tiny'), 7_148_008, 6_955_008 - 3 * 192),
    (Vim, dict(arch='tiny', stride=8), 7_250_344, 7_250_344 - 193_000 - 3 * 192),
    (Vim, dict(arch='small'), 25_796_584, 25_411_584 - 3 * 384),
    (Vim, dict(arch='small', stride=8), 26_001_256, 26_001_256 - 385_000 - 3 * 384),
    (Vim, dict(arch='base'), 97_598_440, 96_829_440 - 3 * 768),
    (Vim, dict(arch='base', stride=8), 98_007_784, 98_007_784 - 769_000 - 3 * 768),
    (ViL, dict(arch='tiny'), 6_391_528, 6_005_376),
    (ViL, dict(arch='small'), 23_398_696, 22_627_392),
    (ViL, dict(arch='base'), 89_263_528, 87_721_920),
    # Version 1: final norm (D), second norm (2 D) and head are what dense features lack.
    (ViL, dict(arch='tiny', version=1), 6_088_360, 6_088_360 - 193_000 - 3 * 192),
    (ViL, dict(arch='tinyplus', version=1), 7_277_840, 7_277_840 - 193_000 - 3 * 192),
    (ViL, dict(arch='tinyplus', version=1, stride=8), 7_277_840, 7_277_840 - 193_000 - 3 * 192),
    (ViL, dict(arch='small', version=1), 22_792_360, 22_792_360 - 385_000 - 3 * 384),
    (ViL, dict(arch='smallplus', version=1), 24_628_664, 24_628_664 - 385_000 - 3 * 384),
    (ViL, dict(arch='base', version=1), 88_050_856, 88_050_856 - 769_000 - 3 * 768),
    (SecViT, dict(arch='tiny'), 14_981_800, 13_429_440),
    (SecViT, dict(arch='small'), 26_776_104, 25_223_744),
    (SecViT, dict(arch='base'), 54_682_776, 53_130_416),
    (SecViT, dict(arch='large'), 96_495_096, 94_811_664),
]


def count(cls, **kwargs):
    with torch.device('meta'):
        model = cls(**kwargs)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ('cls', 'kwargs', 'with_head', 'dense'),
    COUNTS,
    ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_parameters(cls, kwargs, with_head, dense):
    width = 1024
    if cls is not SecViT:
        width = {'tiny': 192, 'small': 384, 'base': 768}[kwargs['arch'].removesuffix('plus')]
        width *= 2 if cls is ViL and 'version' not in kwargs else 1
    head = 1000 * width + 1000
    assert count(cls, **kwargs, out_type='cls') + head == with_head
    assert count(cls, **kwargs) == dense


def test_names():
    assert set(Vim.arch_zoo) == {'tiny', 'small', 'base'}
    assert set(ViL.arch_zoo) == {'tiny', 'tinyplus', 'small', 'smallplus', 'base'}
    assert set(SecViT.arch_zoo) == {'tiny', 'small', 'base', 'large'}


def test_default_arguments_are_the_tiny_models():
    assert count(Vim) == count(Vim, arch='tiny', stride=16, img_size=224, cls_token='middle')
    assert count(ViL) == count(ViL, arch='tiny', version=2, stride=16, img_size=224)
    assert count(SecViT) == count(SecViT, arch='tiny', num_clusters=(32, 8, 2, 1))


@pytest.mark.parametrize(
    ('cls', 'kwargs', 'expected'),
    [
        (Vim, dict(), (5, 11, 17, 23)),
        (ViL, dict(), (2, 5, 8, 11)),
        (ViL, dict(version=1), (5, 11, 17, 23)),
        (ViL, dict(version=1, arch='tinyplus'), (6, 13, 20, 28)),
        (ViL, dict(version=1, arch='smallplus'), (5, 12, 18, 25)),
        (SecViT, dict(), (0, 1, 2, 3)),
    ],
)
def test_default_outputs(cls, kwargs, expected):
    with torch.device('meta'):
        assert cls(**kwargs).out_indices == expected
