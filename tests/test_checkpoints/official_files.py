"""What official checkpoint files look like, full-size without memory and small with values."""

import argparse
import functools
import re

import goldens
import torch

#: Backbones whose official shapes the goldens hold, each with its case.
VARIANTS = {
    'vim-tiny': 'vim_tiny',
    'vim-tiny-stride8': 'vim_tiny_stride8',
    'vim-small': 'vim_small',
    'vim-base': 'vim_base',
    'vil-tiny': 'vil_tiny',
    'vil-tinyplus': 'vil_tinyplus',
    'vil-small': 'vil_small',
    'vil-smallplus': 'vil_smallplus',
    'vil-base': 'vil_base',
    'vil2-tiny': 'vil2_tiny',
    'vil2-small': 'vil2_small',
    'vil2-base': 'vil2_base',
    'secvit-tiny': 'secvit_tiny',
    'secvit-small': 'secvit_small',
    'secvit-base': 'secvit_base',
    'secvit-large': 'secvit_large',
}

#: Depth 4, and depth 1 in each stage of SecViT: the case that the shapes are cut from, and the
#: backbone's config.
SMALL = {
    'vim': (
        'vim_tiny',
        dict(type='visionseq_mm.Vim', arch=dict(embed_dims=192, depth=4)),
    ),
    'vil': (
        'vil_tiny',
        dict(type='visionseq_mm.ViL', arch=dict(embed_dims=192, depth=4), version=1),
    ),
    'vil2': (
        'vil2_tiny',
        dict(type='visionseq_mm.ViL', arch=dict(embed_dims=192, depth=4), version=2),
    ),
    'secvit': (
        'secvit_tiny',
        dict(
            type='visionseq_mm.SecViT',
            arch=dict(
                embed_dims=(64, 128, 256, 512),
                depths=(1, 1, 1, 1),
                num_heads=(2, 4, 8, 16),
                layer_scale=(False, False, False, False),
            ),
        ),
    ),
}


@functools.cache
def shapes(variant):
    """{official name: shape} of a published file, with the position table of 224x224 images."""
    found = dict(goldens.load(VARIANTS[variant]).shapes)
    if 'pos_embed' in found:
        rows = 27 * 27 + 1 if variant.endswith('stride8') else 14 * 14 + 1
        found['pos_embed'] = [1, rows, found['pos_embed'][2]]
    if 'pos_embed.embed' in found:
        found['pos_embed.embed'] = [1, 14, 14, found['pos_embed.embed'][3]]
    return found


def without_memory(shapes, value=0.0):
    """{name: tensor of one value}, however large the shapes are."""
    return {k: torch.tensor(value).expand(shape) for k, shape in shapes.items()}


def small(family):
    """Official weights of a small model, and the config of its backbone."""
    return dict(small_weights(family)), dict(SMALL[family][1])


@functools.cache
def small_weights(family):
    case = SMALL[family][0]
    blocks = r'\.blocks\.[1-9]' if family == 'secvit' else r'^(layers|blocks)\.([4-9]|\d\d)\.'
    kept = {k: s for k, s in goldens.load(case).shapes.items() if not re.search(blocks, k)}
    return goldens.state_dict(kept)


def raw(version, tensors):
    """Vision-LSTM's weights in the names of the training code, which its files have."""

    def single(match):
        return f'blocks.{2 * int(match[1]) + (match[2] == "bot_right")}.'

    norms = {1: ('legacy_norm', 'norm'), 2: ('norm', 'legacy_norm')}[version]
    table = (
        (r'^blocks\.(\d+)\.rowwise_from_(top_left|bot_right)\.', single),
        (r'\.layer\.conv\.', '.layer.conv1d.'),
        (r'^blocks\.(\d+)\.norm\.', r'xlstm.blocks.\1.xlstm_norm.'),
        (r'^blocks\.(\d+)\.layer\.', r'xlstm.blocks.\1.xlstm.'),
        (r'^head\.', 'head.1.'),
        (rf'^{norms[1]}\.', 'head.0.'),
        (rf'^{norms[0]}\.', 'xlstm.post_blocks_norm.'),
    )
    named = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def published_form(family, weights):
    """The dict that a published file of ``family`` holds."""
    if family == 'vil':
        return dict(state_dict=raw(1, weights), ctor_kwargs=dict(dim=192), ckpt=dict(epoch=400))
    if family == 'vil2':
        return dict(state_dict=raw(2, weights), ctor_kwargs=dict(dim=192), ckpt=dict(epoch=400))
    return dict(
        model=weights,
        model_ema={k: v + 1 for k, v in weights.items()},
        optimizer=dict(state={}, param_groups=[dict(lr=1e-3)]),
        epoch=299,
        args=argparse.Namespace(model=family, lr=1e-3),
    )
