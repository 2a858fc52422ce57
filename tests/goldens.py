"""The golden outputs in ``data``: what the official models computed, and how to repeat it.

``data/NAME.json`` describes a case, ``data/NAME.npz`` holds what the official implementation
computed for it in float64, stored as float32. Weights and images are not stored: every tensor
depends on nothing but its name, its shape and a seed, so that a full-size checkpoint is made
from the list of names and shapes alone.
"""

import functools
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / 'data'
NAMES = sorted(path.stem for path in DATA.glob('*.npz'))

#: Largest ‖out - golden‖ / ‖golden‖ of a right implementation. Vision-LSTM's normaliser is
#: ill-conditioned with random weights; SecViT's RoPE angles are rounded to float32.
TOLERANCES = {
    'Vim': {torch.float64: 1e-6, torch.float32: 1e-4},
    'ViL': {torch.float64: 1e-6, torch.float32: 5e-3},
    'SecViT': {torch.float64: 1e-5, torch.float32: 1e-4},
}


@dataclass(frozen=True)
class Case:
    """One golden output.

    Attributes:
        family: Class of the backbone, 'Vim', 'ViL' or 'SecViT'.
        settings: The backbone's arguments beside ``type``.
        shapes: {official name: shape} of the tensors that are made from the seed, the model's
            whole state dict but SecViT's RoPE angles, constants of the constructor.
        seed: Of the weights and the image.
        image_shape: (B, 3, H, W).
        channel_step: Feature arrays keep the channels 0, step, 2 step, ...
        indices: Blocks, pairs or stages whose features were recorded.
    """

    name: str
    family: str
    settings: dict
    shapes: dict
    seed: int
    image_shape: tuple
    channel_step: int
    indices: tuple

    def backbone(self, **settings):
        """Config of the backbone."""
        return dict(type=f'visionseq_mm.{self.family}', **self.settings, **settings)

    @functools.cached_property
    def weights(self):
        """The official checkpoint's, {official name: tensor}."""
        return state_dict(self.shapes, self.seed)

    def image(self):
        return image(self.image_shape[0], *self.image_shape[2:], self.seed)

    def expected(self):
        """{array: tensor} in float64."""
        with np.load(DATA / f'{self.name}.npz') as arrays:
            return {k: torch.from_numpy(v).double() for k, v in arrays.items()}

    def comparable(self, feature):
        """A (B, C, H, W) map in the layout of the arrays: tokens first but for SecViT."""
        feature = feature[:, :: self.channel_step]
        return feature if self.family == 'SecViT' else feature.flatten(2).transpose(1, 2)


def load(name):
    """The case ``name``, one of ``NAMES``."""
    case = json.loads((DATA / f'{name}.json').read_text())
    family, arch = name.split('_')[:2]
    family = {'vim': 'Vim', 'vil': 'ViL', 'vil2': 'ViL', 'secvit': 'SecViT'}[family]
    model, size = case['model'], tuple(case['image'][2:])
    settings = dict(arch=arch)
    if family != 'SecViT':
        settings |= dict(img_size=size, stride=model.get('stride', 16))
    if family == 'ViL':
        settings['version'] = model['ver']
    if model.get('double'):
        settings['cls_token'] = 'double'
    elif not model.get('cls', True):
        settings |= dict(cls_token=None, pooling=model['pool'])
    elif not model.get('middle', True):
        settings['cls_token'] = 'head'
    return Case(
        name=name,
        family=family,
        settings=settings,
        shapes={k: s for k, s in case['shapes'].items() if not k.endswith('RoPE.angle')},
        seed=case['seed'],
        image_shape=tuple(case['image']),
        channel_step=case['channel_step'],
        indices=tuple(sorted({int(k.split('_')[1]) for k in case['arrays'] if '_' in k})),
    )


def error(output, expected):
    """‖output - expected‖ / ‖expected‖."""
    assert output.shape == expected.shape
    return ((output.double() - expected).norm() / expected.norm()).item()


def _rng(name, seed):
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def tensor(name, shape, seed=0):
    """Value of the parameter or buffer ``name``; float32 (int64 for counters)."""
    shape = tuple(shape)
    if name.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.int64)
    rng = _rng(name, seed)
    n = rng.standard_normal(shape)
    leaf = name.rsplit('.', 1)[-1]
    parent = name.rsplit('.', 2)[-2] if name.count('.') else ''
    if leaf in ('A_log', 'A_b_log'):  # S4D-real initialisation, perturbed
        v = np.log(np.arange(1, shape[1] + 1))[None] + 0.1 * n
    elif leaf in ('D', 'D_b', 'learnable_skip'):
        v = 1 + 0.2 * n
    elif parent in ('dt_proj', 'dt_proj_b') and leaf == 'bias':
        dt = np.exp(rng.uniform(math.log(1e-3), math.log(0.1), shape))
        v = dt + np.log(-np.expm1(-dt))  # inverse of softplus
    elif parent == 'fgate' and leaf == 'bias':
        v = np.linspace(1.0, 6.0, shape[0]) + 0.1 * n
    elif leaf == 'running_mean':
        v = 0.1 * n
    elif leaf == 'running_var':
        v = rng.uniform(0.5, 1.5, shape)
    elif leaf in ('gamma_1', 'gamma_2'):
        v = 0.5 + 0.1 * n
    elif 'pos_embed' in name or leaf.startswith('cls_token'):
        v = 0.2 * n
    elif leaf == 'bias':
        v = 0.1 * n
    elif len(shape) == 1:  # norm weights, as stored
        v = 1 + 0.1 * n
    else:
        fan_in = int(np.prod(shape[1:]))
        if len(shape) == 3 and shape[1] == shape[2]:  # (heads, out, in) head-wise projection
            fan_in = shape[2]
        v = n / math.sqrt(fan_in)
        if len(shape) == 4 and shape[1] == 1:  # depth-wise convolution
            v = 0.3 * v
    return torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32))


def state_dict(shapes, seed=0):
    """{name: tensor} for {name: shape}."""
    return {k: tensor(k, s, seed) for k, s in shapes.items()}


def image(batch, height, width, seed=0):
    """(batch, 3, height, width) float32: smooth colour fields plus noise."""
    rng = _rng('image', seed)
    y = np.linspace(0, 1, height)[None, None, :, None]
    x = np.linspace(0, 1, width)[None, None, None, :]
    f = rng.uniform(1, 6, (4, batch, 3, 1, 1))
    v = np.sin(2 * np.pi * f[0] * y + f[1]) * np.cos(2 * np.pi * f[2] * x + f[3])
    v = v + 0.3 * rng.standard_normal((batch, 3, height, width))
    return torch.from_numpy(v.astype(np.float32))
