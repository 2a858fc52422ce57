"""Rates by depth, against tables written by hand."""

import pytest
from mmengine.optim import build_optim_wrapper
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS as MMPRETRAIN
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

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
    'SECSwin': {
        'patch_embed.': 5,
        'stages.0.': 4,
        'stages.1.': 3,
        'stages.2.': 2,
        'stages.3.': 1,
    },
    'SECFasterViT': {
        'patch_embed.': 5,
        'stages.0.': 4,
        'stages.1.': 3,
        'stages.2.': 2,
        'stages.3.': 1,
    },
    'WindowedViT': {
        'patch_embed.': 3,
        'pos_embed': 3,
        'layers.0.': 2,
        'layers.1.': 1,
    },
}
#: What has several dimensions and does not decay, in the first block of the first or last stage.
UNDECAYED = {
    'Vim': {'pos_embed', 'blocks.0.mixer.A_log', 'blocks.0.mixer.A_b_log'},
    'ViL': {
        'pos_embed',
        'blocks.0.rowwise_from_top_left.layer.mlstm_cell.igate.weight',
        'blocks.0.rowwise_from_top_left.layer.mlstm_cell.fgate.weight',
        'blocks.0.rowwise_from_bot_right.layer.mlstm_cell.igate.weight',
        'blocks.0.rowwise_from_bot_right.layer.mlstm_cell.fgate.weight',
    },
    'SecViT': {'stages.3.blocks.0.gamma_1', 'stages.3.blocks.0.gamma_2'},
    'SECSwin': set(),
    'SECFasterViT': set(),
    'WindowedViT': {'pos_embed'},
}
#: Some of what does decay, and of what has one dimension and does not.
DECAYED = {
    'Vim': ('patch_embed.proj.weight', 'blocks.0.mixer.conv1d.weight', 'blocks.0.mixer.x_proj'),
    'ViL': ('patch_embed.proj.weight', 'blocks.0.rowwise_from_top_left.layer.q_proj.weight'),
    'SecViT': ('patch_embed.proj.0.weight', 'stages.0.blocks.0.attn.qkv.weight'),
    'SECSwin': ('patch_embed.projection.weight', 'stages.0.blocks.0.attn.qkv.weight'),
    'SECFasterViT': ('stages.0.blocks.0.conv1.weight', 'stages.2.blocks.0.attn.qkv.weight'),
    'WindowedViT': ('patch_embed.projection.weight', 'layers.0.attn.qkv.weight'),
}
FLAT = {
    'Vim': ('blocks.0.norm.weight', 'blocks.0.mixer.D', 'blocks.0.mixer.dt_proj.bias'),
    'ViL': (
        'blocks.0.rowwise_from_top_left.norm.weight',
        'blocks.0.rowwise_from_top_left.layer.mlstm_cell.outnorm.weight',
        'blocks.0.rowwise_from_top_left.layer.learnable_skip',
    ),
    'SecViT': ('patch_embed.proj.1.weight', 'stages.0.blocks.0.norm1.weight'),
    'SECSwin': ('stages.0.blocks.0.norm1.weight',),
    'SECFasterViT': ('stages.2.blocks.0.norm1.weight',),
    'WindowedViT': ('layers.0.ln1.weight', 'layers.1.attn.qkv.bias'),
}
SMALL = {
    'Vim': dict(arch=dict(embed_dims=16, depth=3), out_indices=-1),
    'ViL': dict(arch=dict(embed_dims=16, depth=2), out_indices=-1),
    'SecViT': dict(
        arch=dict(
            embed_dims=(8, 8, 8, 8),
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
            layer_scale=(False, False, False, True),
        ),
        out_norm=dict(type='visionseq_mm.LN2d'),
    ),
    'SECSwin': dict(),
    'SECFasterViT': dict(),
    'WindowedViT': dict(
        arch=dict(
            embed_dims=16,
            num_layers=2,
            num_heads=2,
            feedforward_channels=32,
            global_attn_indexes=[1],
        ),
        out_channels=0,
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
    groups = optimizer(model, layer_decay_rate=0.5).param_groups
    found = {p: group for group in groups for p in group['params']}
    for parameter_name, parameter in model.backbone.named_parameters():
        (exponent,) = (
            exponent
            for beginning, exponent in DEPTHS[name].items()
            if parameter_name.startswith(beginning)
        )
        assert found[parameter]['lr'] == 0.5 * 0.5**exponent, parameter_name
    assert found[model.head.weight]['lr'] == found[model.head.bias]['lr'] == 0.5
    assert len(found) == len(list(model.parameters()))
    settings = [(group['lr'], group['weight_decay']) for group in groups]
    assert len(settings) == len(set(settings)), 'parameters with the same settings share a group'


@pytest.mark.parametrize('name', SMALL)
def test_weight_decay(name):
    """The same without layer_decay_rate below 1, as most configs have it."""
    model = build(name)
    groups = optimizer(model, layer_decay_rate=1).param_groups
    assert len(groups) == 2
    found = {p: group['weight_decay'] for group in groups for p in group['params']}
    found = {key: found[p] for key, p in model.named_parameters()}
    assert {'head.weight', *(f'backbone.{key}' for key in UNDECAYED[name])} <= set(found)
    for key, decay in found.items():
        inner = key.removeprefix('backbone.')
        flat = key.endswith(('bias', 'norm.weight')) or inner.startswith(FLAT[name])
        if inner.startswith(DECAYED[name]) or key == 'head.weight':
            assert decay == 0.1, key
        elif flat or any(inner.endswith(end.split('0.')[-1]) for end in UNDECAYED[name]):
            assert decay == 0, key


def test_custom_keys_decide_on_the_decay():
    model = build('Vim')
    custom = {'pos_embed': dict(decay_mult=0.5), 'blocks.1': dict(lr_mult=2.0)}
    groups = optimizer(model, layer_decay_rate=1, custom_keys=custom).param_groups
    found = {p: group for group in groups for p in group['params']}
    assert found[model.backbone.pos_embed]['weight_decay'] == 0.05
    mixer = model.backbone.blocks[1].mixer
    assert found[mixer.A_log]['lr'] == 1
    assert found[mixer.A_log]['weight_decay'] == found[mixer.D]['weight_decay'] == 0


def test_wrapped_blocks():
    """Their names are others, as FSDP's; rates and decay are the same."""
    model, wrapped = build('Vim'), build('Vim')
    wrapped.backbone.blocks[1] = checkpoint_wrapper(wrapped.backbone.blocks[1])
    assert [name for name, _ in wrapped.named_parameters()] != list(dict(model.named_parameters()))
    settings = []
    for each in (model, wrapped):
        groups = optimizer(each, layer_decay_rate=0.5).param_groups
        found = {p: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
        settings.append([found[p] for p in each.parameters()])
    assert settings[0] == settings[1]


def test_flat_parameters_under_a_custom_key():
    """mmengine would have them decay then."""
    model = build('WindowedViT')
    custom = {'head': dict(lr_mult=3.0), 'backbone': dict(lr_mult=2.0)}
    groups = optimizer(model, layer_decay_rate=1, custom_keys=custom).param_groups
    decay = {p: group['weight_decay'] for group in groups for p in group['params']}
    for name, param in model.named_parameters():
        assert decay[param] == (0.1 if param.ndim > 1 and 'pos_embed' not in name else 0), name


def test_the_longest_custom_key_decides():
    """As for mmengine."""
    model = build('Vim')
    custom = {'blocks': dict(decay_mult=1.0), 'blocks.1': dict(lr_mult=2.0)}
    groups = optimizer(model, layer_decay_rate=1, custom_keys=custom).param_groups
    found = {p: group['weight_decay'] for group in groups for p in group['params']}
    first, second, _ = (block.mixer.A_log for block in model.backbone.blocks)
    assert (found[first], found[second]) == (0.1, 0)


@pytest.mark.parametrize('key', ['norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult'])
def test_other_rules_for_norms_and_biases(key):
    optimizer(build('Vim'), layer_decay_rate=1, **{key: 0.0})
    with pytest.raises(ValueError, match=f'has {key}=1.0, .* decay_mult in custom_keys'):
        optimizer(build('Vim'), layer_decay_rate=1, **{key: 1.0})


def test_mmpretrain_backbone():
    """The baseline's ViT, which tells depths by the same protocol."""
    vit = MMPRETRAIN.build(
        dict(
            type='VisionTransformer',
            arch=dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32),
            img_size=32,
        )
    )
    model = Model(vit)
    groups = optimizer(model, layer_decay_rate=0.5).param_groups
    rates = {p: group['lr'] for group in groups for p in group['params']}
    assert rates[vit.pos_embed] == rates[vit.patch_embed.projection.weight] == 0.5**5
    assert [rates[layer.ln1.weight] for layer in vit.layers] == [0.5**4, 0.5**3, 0.5**2]
    assert rates[model.head.weight] == 0.5


@pytest.mark.parametrize('name', SMALL)
def test_mmpretrain_constructor(name):
    """mmpretrain's own gives our backbones the same rates."""
    model = ImageClassifier(
        backbone=dict(type=f'visionseq_mm.{name}', **SMALL[name]),
        head=dict(type='LinearClsHead', in_channels=2, num_classes=2),
    )
    theirs = build_optim_wrapper(
        model,
        dict(
            constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.5, weight_decay=0.1),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    ).optimizer
    ours = optimizer(model, layer_decay_rate=0.5)
    rates, expected = (
        {p: group['lr'] for group in groups.param_groups for p in group['params']}
        for groups in (ours, theirs)
    )
    assert rates == expected


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
    with pytest.raises(ValueError, match='but Conv2d has no get_layer_depth'):
        optimizer(Model(nn.Conv2d(1, 1, 1)), layer_decay_rate=0.9)
