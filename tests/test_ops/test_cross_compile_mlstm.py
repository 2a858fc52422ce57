"""The mLSTM cell's Triton kernels, compiled for sm_90 from what the op launches.

A tile of rows has 96 registers of sums and 32 of weights for each thread. 168 registers let three
warps share a scheduler, 255 two. Budgets are what was counted, and a little more.
"""

from functools import cache

import pytest
import torch
from cross_compile import build_launch, disassemble, launches

from visionseq_mm.ops.mlstm import triton as kernels


@cache
def recorded(Dh, dtype, S=1000, H=4, reverse=True):
    """Kernels of both passes, with the arguments of their launches."""
    q, k, v, dh, h = torch.empty((5, 2, S, H, Dh), dtype=dtype, device='meta')
    i, f = torch.empty((2, 2, S, H), device='meta')
    sums = torch.empty((2 * H, S), device='meta')
    inputs = q, k, v, i, f
    return [
        *launches(kernels, kernels.forward, *inputs, reverse, 1e-6),
        *launches(kernels, kernels.backward, dh, *inputs, h, sums, reverse, 1e-6),
    ]


def compiled(name, tmp_path, *args, **kwargs):
    """SASS, registers and stack of each variant of a kernel that the op launches."""
    variants = {}
    for kernel, arguments, options in recorded(*args, **kwargs):
        if kernel == f'_{name}_kernel':
            variants[arguments.get('BACKWARD')] = arguments, options
    assert variants
    return [
        disassemble(build_launch(getattr(kernels, f'_{name}_kernel'), *variant), tmp_path)
        for variant in variants.values()
    ]


def test_launches():
    names = [name.strip('_').removesuffix('_kernel') for name, *_ in recorded(96, torch.bfloat16)]
    assert names == [
        *('gates', 'states', 'carry', 'output'),
        *('gates', 'states', 'carry', 'rows', 'states', 'carry', 'gradients', 'gate_gradients'),
    ]
    names = [name for name, *_ in recorded(96, torch.bfloat16, S=100)]
    assert '_states_kernel' not in names


PRODUCTS = ('states', 'output', 'gradients')
REGISTERS = {  # of a thread, for heads of 96 and of 384 channels
    'gates': (40, 48),
    'states': (168, 232),
    'carry': (224, 224),
    'output': (168, 255),
    'rows': (64, 128),
    'gradients': (168, 255),
    'gate_gradients': (48, 56),
}


@pytest.mark.parametrize('Dh, which', [(96, 0), pytest.param(384, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', REGISTERS)
def test_half_precision(name, Dh, which, tmp_path):
    """Products on the tensor cores of a warp group, and nothing that does not fit registers.

    But for a few values of the wide gradients, which lie outside of the loops.
    """
    for sass, registers, stack in compiled(name, tmp_path, Dh, torch.bfloat16):
        assert registers <= REGISTERS[name][which]
        assert stack <= (48 if (name, Dh) == ('gradients', 384) else 0)
        assert ('HGMMA' in sass) == (name in PRODUCTS)
        assert ' HMMA' not in sass


@pytest.mark.parametrize('name', PRODUCTS)
def test_float32(name, tmp_path):
    for _, _, stack in compiled(name, tmp_path, 96, torch.float32):
        assert stack == 0


@pytest.mark.parametrize('name', sorted(REGISTERS.keys() - {'states'}))
def test_sizes_of_one(name, tmp_path):
    """Which Triton takes for constants; NVIDIA's assembler is the judge."""
    assert compiled(name, tmp_path, 1, torch.bfloat16, S=1, H=1)
