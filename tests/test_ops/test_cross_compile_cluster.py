"""Cluster attention's Triton kernels, compiled for sm_90 from what the op launches.

Budgets are what was counted, and a little more: instructions of the loop over whole tiles for each
score of a thread, where an exponential keeps its unit busy for eight, and registers of a thread,
168 of which let three programs of four warps share a multiprocessor, and 255 two.
"""

import re
from functools import cache

import pytest
import torch
from cross_compile import build_launch, disassemble, launches, loops

from visionseq_mm.ops.cluster_attention import triton as kernels


@cache
def recorded(Dh, dtype, L, H, K, masked):
    """Kernels of both passes, with the arguments of their launches."""
    q, k, dout, lepe = torch.empty((4, 2, L, H, Dh), dtype=dtype, device='meta')
    v = torch.empty((2, L, 3 * H * Dh), dtype=dtype, device='meta')[..., -H * Dh :]
    v = v.unflatten(2, (H, Dh))
    idx = torch.empty((2, H, L), dtype=torch.int32, device='meta')
    sums = torch.empty((2, H, L), device='meta')
    valid = torch.empty((2, L), dtype=torch.bool, device='meta') if masked else None
    found = launches(kernels, kernels.forward, q, k, v, idx, K, valid, lepe, True)
    found += launches(kernels, kernels.backward, dout, q, k, v, idx, q, sums, K, valid)
    assert [name for name, *_ in found] == ['_forward_kernel', '_queries_kernel', '_keys_kernel']
    return {name.strip('_').removesuffix('_kernel'): launch for name, *launch in found}


def compiled(name, tmp_path, Dh, dtype, L=16384, H=4, K=8, masked=False):
    """SASS, registers, stack, and instructions of a score in the loop over whole tiles."""
    arguments, options = recorded(Dh, dtype, L, H, K, masked)[name]
    kernel = build_launch(getattr(kernels, f'_{name}_kernel'), arguments, options)
    sass, registers, stack = disassemble(kernel, tmp_path)
    scores = arguments['PARTS'] * arguments['ROWS'] * arguments['COLUMNS']
    scores //= 32 * options['num_warps']
    loop = max(loops(sass), key=lambda loop: loop['LDGSTS.E.BYPASS.128'])
    return sass, registers, stack, loop, scores


slow = pytest.mark.slow
BUDGETS = {  # slots of a score and registers of a thread, by channels of a head
    'forward': {16: (5.9, 168), 32: (6.2, 168), 64: (6.9, 255)},
    'queries': {16: (6.0, 128), 32: (6.6, 160), 64: (7.9, 216)},
    'keys': {16: (7.0, 168), 32: (7.3, 232), 64: (9.9, 224)},
}


@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str
)
@pytest.mark.parametrize('Dh', [32, pytest.param(16, marks=slow), pytest.param(64, marks=slow)])
@pytest.mark.parametrize('name', BUDGETS)
def test_half_precision(name, Dh, dtype, tmp_path):
    """Asynchronous products and copies, an exponential for a score, and nothing spilt in loops."""
    sass, registers, stack, loop, scores = compiled(name, tmp_path, Dh, dtype)
    slots, most = BUDGETS[name][Dh]
    assert sum(loop.values()) <= slots * scores
    assert registers <= most
    assert stack <= 32
    assert not loop.keys() & {'LDL', 'STL', 'LDL.LU'}
    assert loop['LDGSTS.E.BYPASS.128']
    exponentials = sum(n for what, n in loop.items() if 'EX2' in what)
    assert scores <= exponentials <= 1.04 * scores
    products = sum(n for what, n in loop.items() if what.startswith('HGMMA'))
    waits = sum(n for what, n in loop.items() if what.startswith('WARPGROUP.DEPBAR'))
    assert waits <= 4 < products, 'the assembler has put the products in sequence'
    assert not re.search(r'\sHMMA', sass)


@pytest.mark.parametrize('Dh', [32, *(pytest.param(Dh, marks=slow) for Dh in (16, 64, 128))])
@pytest.mark.parametrize('name', BUDGETS)
def test_float32(name, Dh, tmp_path):
    sass, _, stack, _, _ = compiled(name, tmp_path, Dh, torch.float32)
    assert stack == 0
    assert not re.search(r'\sHG?MMA', sass)  # no tf32


@slow
@pytest.mark.parametrize('name', BUDGETS)
def test_wide_heads(name, tmp_path):
    _, _, stack, loop, _ = compiled(name, tmp_path, 128, torch.bfloat16)
    assert stack == 0
    assert any(what.startswith('HGMMA') for what in loop)


@slow
@pytest.mark.parametrize('name', BUDGETS)
@pytest.mark.parametrize(
    'Dh, sizes', [(1, dict(L=1, H=1, K=1)), (40, dict(L=1000, masked=True))], ids=['ones', 'odd']
)
def test_other_sizes(name, Dh, sizes, tmp_path):
    """Sizes of one are constants to Triton; NVIDIA's assembler is the judge."""
    assert compiled(name, tmp_path, Dh, torch.bfloat16, **sizes)
