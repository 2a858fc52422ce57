"""The kernels of the ViL layer compiled for sm_90: registers, spills, vectors and instructions.

An H200 issues 3.2e13 instructions of a thread a second, and moves an element of bf16 in the time
of 15. Budgets are what was counted, and a little more; `pre` writes four and reads one.
"""

import re

import pytest
from cross_compile import build, disassemble, loops, triton

from visionseq_mm.ops.vil_mixer import triton as mixer

DATA = ('x', 'c', 'q', 'k', 'v', 'g', 'h', 'y', 'z', 'conv_bias', 'qkv_bias')
DATA += tuple(f'd{name}' for name in DATA)
ODD = ('h', 'w', 'tiles', 'all_tiles', 'N')  # sizes that 16 need not divide
GRID = dict(H=4, KH=3, KW=3, TOP=1, LEFT=1, HEIGHT=mixer.TOKENS // mixer.WIDTH, WIDTH=mixer.WIDTH)
DOTS = dict(GATES=16, PRECISION='tf32')
WIDE_DOTS = dict(GATES=16, PRECISION='tf32x3')
STAGES = dict(num_stages=1)
WEIGHTS = dict(H=4, TOKENS=mixer.TOKENS_WEIGHTS, CHANNELS=mixer.CHANNELS, **DOTS)
WIDE_WEIGHTS = dict(H=4, TOKENS=mixer.TOKENS_WIDE, CHANNELS=mixer.CHANNELS_WIDE, **WIDE_DOTS)

# Constants without E, the same where they differ in float32, options, registers.
KERNELS = {
    'pre': (
        mixer._pre_kernel,
        dict(GRID, CHANNELS=mixer.CHANNELS, **DOTS),
        WIDE_DOTS,
        STAGES,
        96,
    ),
    'g': (mixer._g_kernel, dict(GRID, CHANNELS=mixer.CHANNELS), {}, {}, 128),
    'dx': (mixer._dx_kernel, dict(GRID, CHANNELS=mixer.CHANNELS_DX), {}, {}, 200),
    'weights': (mixer._weights_kernel, WEIGHTS, WIDE_WEIGHTS, dict(num_stages=2), 255),
}
# Instructions for an element: of all loops, and of a row of taps where that is a loop.
BUDGETS = {'pre': (105, 12.5), 'g': (92, 12.5), 'dx': (92, 0), 'weights': (19, 0)}
NORMS = {
    'post': (mixer._post_kernel, 64, 43),
    'post-backward': (mixer._post_backward_kernel, 168, 80),
}


def compile_kernel(name, dtype, E, **constants):
    kernel, narrow, wide, options, _ = KERNELS[name]
    constants = {**narrow, **(wide if dtype == 'fp32' else {}), 'E': E, **constants}
    compiled = build(kernel, dtype, constants, DATA, ODD, **options)
    return constants, compiled


def assert_vectors(sass):
    """The tiles are read and written 16 bytes at a time."""
    for instruction in ('LDG', 'STG'):
        assert f'{instruction}.E.128' in sass
        assert f'{instruction}.E.U16' not in sass


@pytest.mark.parametrize('name', KERNELS)
def test_instructions(name, tmp_path):
    constants, compiled = compile_kernel(name, 'bf16', 384)
    sass, registers, stack = disassemble(compiled, tmp_path)
    assert stack == 0
    assert registers <= KERNELS[name][-1]
    tokens = constants.get('TOKENS', mixer.TOKENS)
    elements = tokens * constants['CHANNELS'] // 128  # of a thread
    most, most_of_row = BUDGETS[name]
    loop = max(loops(sass), key=lambda loop: loop.total()).total()
    if most_of_row:
        assert_vectors(sass)
        assert loop <= most_of_row * elements
        # What is before and after the loop over channels included.
        loop = len(re.findall(r'^\s+/\*[0-9a-f]{4,}\*/', sass, re.M)) + 2 * loop
    assert loop <= most * elements


@pytest.mark.slow
@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('dtype, E', [('fp16', 24), ('fp32', 384), ('bf16', 1536)])
def test_other_types_and_widths(name, dtype, E, tmp_path):
    _, compiled = compile_kernel(name, dtype, E)
    sass, _, stack = disassemble(compiled, tmp_path)
    assert stack <= (32 if E == 24 else 0)  # with the masks of half a tile
    if name in ('pre', 'g') and E > 24:
        assert_vectors(sass)


@pytest.mark.parametrize('name', ['pre', 'g', 'dx'])
def test_sequences(name, tmp_path):
    """Grids of one row."""
    shape = dict(KH=1, KW=4, TOP=0, LEFT=3, HEIGHT=1, WIDTH=mixer.TOKENS)
    _, compiled = compile_kernel(name, 'bf16', 384, **shape, h=1)
    assert disassemble(compiled, tmp_path)[2] <= 8


@pytest.mark.parametrize('name', KERNELS)
def test_sizes_of_one(name, tmp_path):
    """Which Triton takes for constants; NVIDIA's assembler is the judge."""
    sizes = {size: 1 for size in ODD if size in KERNELS[name][0].arg_names}
    _, compiled = compile_kernel(name, 'bf16', 384, **sizes)
    assert disassemble(compiled, tmp_path)[0]


@pytest.mark.parametrize('dtype, Dh', [('bf16', 96), ('fp32', 96), ('bf16', 384)])
@pytest.mark.parametrize('name', NORMS)
def test_norm(name, dtype, Dh, tmp_path):
    kernel, most_registers, most_instructions = NORMS[name]
    block = triton.next_power_of_2(Dh)
    constants = dict(Dh=Dh, BLOCK=block, TOKENS=mixer.NORM_TILE // block)
    compiled = build(kernel, dtype, constants, DATA, ODD, types=dict(eps='fp32'))
    sass, registers, stack = disassemble(compiled, tmp_path)
    assert stack == 0
    assert registers <= most_registers
    assert_vectors(sass)
    loop = max(loops(sass), key=lambda loop: loop.total())
    if dtype == 'bf16':
        assert loop.total() <= most_instructions * 8 * Dh / block
