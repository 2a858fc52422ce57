"""Rates by depth, against tables written by hand."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from visionseq_mm.registry import MODELS

#: {beginning of a parameter's name: exponent of the decay}, of backbones cut to few blocks.
DEPTHS = {
    'Vim': {
        'patch_embed.': 4,
        'pos_embed': 4,
        'blocks.0.': 3,
        'blocks.1.': 2,
        'blocks.2.': 1,
    },
    'ViL': {  # pairs
        'patch_embed.': 3,
        'pos_embed': 3,
        'blocks.0.': 2,
        'blocks.1.': 1,
    },
    'SecViT': {
        'patch_embed.': 5,
        'stages.0.': 4,
        'stages.1.': 3,
        'stages.2.': 2,
        'stages.3.': 1,
        'out_norms.': 0,
    },
}
SMALL = {
    'Vim': dict(arch=dict(embed_dims=16, depth=3), out_indices=-1),
    'ViL': dict(arch=dict(embed_dims=16, depth=2), out_indices=-1),
    'SecViT': dict(
        arch=dict(
            embed_dims=(8, 8, 8, 8),
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
            layer_scale=(False,) * 4,
        ),
        out_norm=dict(type='visionseq_mm.LN2d'),
    ),
}


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def optimizer(model, **paramwise_cfg):
    return build_optim_wrapper(
        model,
        dict(
            constructor='visionseq_mm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.5, weight_decay=0.1),
            paramwise_cfg=paramwise_cfg,
        ),
    ).optimizer


def build(name, **settings):
    return Model(MODELS.build(dict(type=f'visionseq_mm.{name}', **SMALL[name], **settings)))


@pytest.mark.parametrize('name', SMALL)
def test_rates(name):
    model = build(name)
    groups = optimizer(model, layer_decay_rate=0.5, flat_decay_mult=0.0).param_groups
    found = {p: group for group in groups for p in group['params']}
    for parameter_name, parameter in model.backbone.named_parameters():
        (exponent,) = (
            exponent
            for beginning, exponent in DEPTHS[name].items()
            if parameter_name.startswith(beginning)
        )
        assert found[parameter]['lr'] == 0.5 * 0.5**exponent, parameter_name
        assert found[parameter]['weight_decay'] == (0.1 if parameter.ndim > 1 else 0)
    assert all(found[p]['lr'] == 0.5 for p in model.head.parameters())
    assert len(found) == len(list(model.parameters()))
    settings = [(group['lr'], group['weight_decay']) for group in groups]
    assert len(settings) == len(set(settings)), 'parameters with the same settings share a group'


def test_multiplies_what_mmengine_gives():
    """A rate of one's own for some parameters, and frozen ones left alone."""
    model = build('Vim', frozen_stages=1)
    custom = {'blocks.2': dict(lr_mult=10.0)}
    groups = optimizer(model, layer_decay_rate=0.5, custom_keys=custom).param_groups
    rates = {p: group['lr'] for group in groups for p in group['params']}
    assert {rates[p] for p in model.backbone.blocks[2].parameters()} == {0.5 * 10 * 0.5}
    assert {rates[p] for p in model.backbone.blocks[1].parameters()} == {0.5 * 0.25}


@pytest.mark.parametrize('rate', [None, 0, 1.5, '0.9'])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=f'layer_decay_rate above 0 .* got {rate!r}'):
        optimizer(build('Vim'), layer_decay_rate=rate)


def test_no_paramwise_cfg():
    wrapper = dict(
        constructor='visionseq_mm.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=0.5),
    )
    with pytest.raises(ValueError, match='got None'):
        build_optim_wrapper(build('Vim'), wrapper)


def test_foreign_backbone():
    with pytest.raises(ValueError, match='got Conv2d'):
        optimizer(Model(nn.Conv2d(1, 1, 1)), layer_decay_rate=0.9)
