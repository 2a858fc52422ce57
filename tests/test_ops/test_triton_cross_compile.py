"""Vim's Triton kernels, compiled for sm_90.

An exponential occupies a scheduler as long as eight instructions do, so that a loop of up to
eight for each element is limited by its exponentials. 128 registers let four warps share a
scheduler, 255 two. Budgets are what was counted, and a little more.
"""

import cross_compile
import pytest
from cross_compile import disassemble, loops

from visionseq_mm.ops.conv1d_silu import triton as conv
from visionseq_mm.ops.selective_scan import triton as scan
from visionseq_mm.ops.vim_mixer import triton as mixer

DATA = ('u', 'dt', 'delta', 'z', 'out', 'dout', 'y', 'dz', 'du', 'ddt', 'x', 'dx', 'low', 'weight')
ODD = ('L', 'batch', 'chunks', 'low_token')
THREAD = scan.TILE // 32  # elements that each thread has of a tile of states
SCAN_OPTIONS = dict(num_warps=1, num_stages=1)
FULL_SCAN = dict(S=2, REVERSE=2, N=16, BLOCK_N=16, BLOCK_D=64)
MANY_STATES = dict(S=2, REVERSE=2, N=64, BLOCK_N=64, BLOCK_D=32)
FULL_CONV = dict(S=2, REVERSE=2, W=4, TOKENS=conv.TOKENS, CHANNELS=conv.CHANNELS)


def build(kernel, dtype, constants, **options):
    """Backwards, the scan's x is dy, which is float32."""
    data = [name for name in DATA if name != 'x' or not constants.get('BACKWARD')]
    return cross_compile.build(kernel, dtype, constants, data, ODD, **options)


def scan_steps(sass):
    """The loops over tokens without the remainders of unrolled ones, and elements of each."""
    elements = [loop['MUFU.EX2'] // THREAD * THREAD for loop in loops(sass)]
    return [(loop, n) for loop, n in zip(loops(sass), elements, strict=True) if n == max(elements)]


SCANS = {  # kernel, constants, registers, instructions for each element
    'chunk': (scan._chunk_kernel, dict(BACKWARD=False), 128, 5.5),
    'chunk-backward': (scan._chunk_kernel, dict(BACKWARD=True), 128, 5.5),
    'scan': (scan._scan_kernel, {}, 128, 8.5),
    'h': (scan._h_kernel, dict(PRECISION='tf32'), 255, 15),
    'lambda': (scan._lambda_kernel, dict(PRECISION='tf32'), 255, 14.5),
}


@pytest.mark.parametrize('name', SCANS)
def test_scan_loops(name, tmp_path):
    kernel, constants, most_registers, most_instructions = SCANS[name]
    compiled = build(kernel, 'bf16', {**FULL_SCAN, **constants}, **SCAN_OPTIONS)
    sass, registers, stack = disassemble(compiled, tmp_path)
    assert registers <= most_registers
    assert stack == 0
    for loop, elements in scan_steps(sass):
        assert elements >= THREAD
        assert loop.total() <= most_instructions * elements
        assert loop['MUFU.EX2'] <= 1.125 * elements  # those of the gate and of softplus'


@pytest.mark.parametrize('dtype', ['fp16', 'fp32'])
@pytest.mark.parametrize('name', SCANS)
def test_scan_in_other_types(name, dtype, tmp_path):
    kernel, constants, *_ = SCANS[name]
    if dtype == 'fp32' and 'PRECISION' in constants:
        constants = dict(PRECISION='tf32x3')
    compiled = build(kernel, dtype, {**FULL_SCAN, **constants}, **SCAN_OPTIONS)
    assert disassemble(compiled, tmp_path)[2] == 0


@pytest.mark.parametrize('name', SCANS)
def test_scan_of_many_states(name, tmp_path):
    kernel, constants, *_ = SCANS[name]
    compiled = build(kernel, 'bf16', {**MANY_STATES, **constants}, num_warps=2, num_stages=1)
    assert disassemble(compiled, tmp_path)[2] <= 32


OTHERS = {  # kernel, constants, options, registers
    'carry': (
        scan._carry_kernel,
        dict(BACKWARD=False, REVERSE=2, N=16, AHEAD=scan.AHEAD, BLOCK=128),
        dict(num_warps=1),
        200,
    ),
    'softplus': (
        scan._softplus_kernel,
        dict(TOKENS=scan.SHORTEST, CHANNELS=scan.CHANNELS),
        {},
        128,
    ),
    'conv': (conv._forward_kernel, FULL_CONV, {}, 128),
    'conv-backward': (
        conv._backward_kernel,
        FULL_CONV,
        dict(num_warps=1, maxnreg=conv.REGISTERS),
        168,
    ),
    'delta': (
        mixer._delta_kernel,
        dict(R=12, BLOCK_R=16, TOKENS=mixer.TOKENS, CHANNELS=mixer.CHANNELS),
        {},
        128,
    ),
}


@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
@pytest.mark.parametrize('name', OTHERS)
def test_other_kernels(name, dtype, tmp_path):
    kernel, constants, options, most_registers = OTHERS[name]
    _, registers, stack = disassemble(build(kernel, dtype, constants, **options), tmp_path)
    assert stack == 0
    assert dtype == 'fp32' or registers <= most_registers


@pytest.mark.parametrize('dtype, tokens', [('bf16', mixer.TOKENS), ('fp32', mixer.TOKENS // 2)])
def test_steps_of_a_wide_model(dtype, tokens, tmp_path):
    constants = dict(R=48, BLOCK_R=64, TOKENS=tokens, CHANNELS=mixer.CHANNELS)
    compiled = build(mixer._delta_kernel, dtype, constants)
    assert disassemble(compiled, tmp_path)[2] == 0


@pytest.mark.parametrize('name', [*SCANS, *OTHERS])
def test_sizes_of_one(name, tmp_path):
    """Which Triton takes for constants; NVIDIA's assembler is the judge."""
    if name in SCANS:
        kernel, constants, *_ = SCANS[name]
        constants, options = {**FULL_SCAN, **constants, 'S': 1, 'REVERSE': 1}, SCAN_OPTIONS
    else:
        kernel, constants, options, _ = OTHERS[name]
    sizes = {size: 1 for size in ('L', 'D', 'batch', 'chunks') if size in kernel.arg_names}
    compiled = build(kernel, 'bf16', {**constants, **sizes}, **options)
    assert disassemble(compiled, tmp_path)[0]
