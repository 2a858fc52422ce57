"""What works on SecViT's grids, compiled for sm_90: registers, spills, vectors, instructions.

An H200 moves an element of bf16 in the time of 13 instructions of a thread. Budgets are what was
counted, and a little more.
"""

import re

import pytest
import torch
from cross_compile import build_launch, disassemble, launches, loops

from visionseq_mm.ops.cluster_attention import triton_partition
from visionseq_mm.ops.depthwise_conv2d import triton as conv
from visionseq_mm.ops.rotary_2d import triton as rotary


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device='meta')


def compiled(module, fn, args, tmp_path, only=''):
    """Of each launch: name, SASS, registers, stack."""
    for name, arguments, options in launches(module, fn, *args):
        if only in name:
            kernel = build_launch(getattr(module, name), arguments, options)
            yield name, *disassemble(kernel, tmp_path)


def instructions(sass):
    return len(re.findall(r'^\s+/\*[0-9a-f]{4,}\*/', sass, re.M))


def largest_loop(sass):
    return max(loops(sass), key=lambda loop: loop.total())


def partition_args(L, H, Dh, K, dtype=torch.bfloat16, partly=False):
    valid = empty(8, L, dtype=torch.bool) if partly else None
    return empty(8, L, H, Dh, dtype=dtype), K, valid


PARTITION = {  # most registers
    '_sums_kernel': 104,
    '_keys_kernel': 64,
    '_mark_kernel': 128,
    '_border_kernel': 80,
    '_place_kernel': 85,
}


def test_partition(tmp_path):
    """Of stage 1 of SecViT-S; no kernel but five."""
    args = partition_args(65536, 2, 32, 32)
    found = {}
    for name, sass, registers, stack in compiled(
        triton_partition, triton_partition.partition, args, tmp_path
    ):
        assert stack == 0, name
        assert registers <= PARTITION[name], name
        found[name] = sass
    assert list(found) == list(PARTITION)
    elements = triton_partition.TILE // 128  # of a thread
    for name, most in (('_sums_kernel', 4), ('_keys_kernel', 13)):
        assert 'LDG.E.128' in found[name] and 'LDG.E.U16' not in found[name]
        assert largest_loop(found[name]).total() <= most * elements
    assert largest_loop(found['_sums_kernel'])['F2F.F64.BF16'] == elements  # once for each
    # Equal keys have equal cosines, whatever their place in a thread.
    assert 'FFMA' not in largest_loop(found['_keys_kernel'])
    for name in ('_keys_kernel', '_border_kernel'):  # their counts are wanted by nobody at once
        assert 'REDG.E.ADD' in found[name] and 'ATOMG' not in found[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    'L, H, Dh, K, dtype, partly',
    [
        (16384, 4, 32, 8, torch.bfloat16, True),
        (262144, 4, 16, 64, torch.float16, True),
        (65536, 2, 32, 32, torch.float32, False),
        (4095, 3, 128, 2, torch.float32, True),
        (1, 1, 4, 1, torch.bfloat16, False),
        (7, 1, 12, 7, torch.bfloat16, True),
    ],
)
def test_partition_of_other_sizes(L, H, Dh, K, dtype, partly, tmp_path):
    args = partition_args(L, H, Dh, K, dtype, partly)
    for name, _, _, stack in compiled(
        triton_partition, triton_partition.partition, args, tmp_path
    ):
        assert stack == 0, name


def rotary_args(n, H, Dh, dtype=torch.bfloat16):
    q, k, _ = empty(8, n, n, 3, H, Dh, dtype=dtype).unbind(3)
    return q, k, False


def check_rotary(args, tmp_path):
    ((_, sass, registers, stack),) = compiled(rotary, rotary.rotate, args, tmp_path)
    assert stack == 0
    assert registers <= 128
    elements = 2 * rotary.TILE // 128
    for instruction in ('LDG', 'STG'):
        vectors = len(re.findall(rf'{instruction}\.E\.128', sass))
        assert vectors * 16 >= elements * args[0].element_size()
    assert instructions(sass) <= 12 * elements  # 27 are in the time of reading and writing


def test_rotary(tmp_path):
    check_rotary(rotary_args(256, 2, 32), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    'n, H, Dh, dtype',
    [
        (32, 16, 32, torch.bfloat16),
        (256, 5, 16, torch.float16),
        (256, 2, 32, torch.float32),
        (64, 3, 64, torch.bfloat16),
    ],
)
def test_rotary_of_other_sizes(n, H, Dh, dtype, tmp_path):
    check_rotary(rotary_args(n, H, Dh, dtype), tmp_path)


def conv_args(n, C, K, dtype=torch.bfloat16):
    """Of forward, x a third of a wider tensor."""
    x = empty(8, n, n, 3 * C, dtype=dtype)[..., :C]
    return x, empty(C, 1, K, K, dtype=dtype), empty(C, dtype=dtype), True


def backward_args(n, C, K, dtype=torch.bfloat16):
    x, weight, *_ = conv_args(n, C, K, dtype)
    return empty(8, n, n, C, dtype=dtype), x, weight, True


def check_conv(fn, args, kernel, most_registers, most_instructions, tmp_path):
    """Instructions of the loop over rows for an element of a thread."""
    ((_, sass, registers, stack),) = compiled(conv, fn, args, tmp_path, kernel)
    assert stack == 0
    assert registers <= most_registers
    backward = fn is conv.backward
    K = args[1 + backward].shape[-1]
    columns = conv._constants(args[0].shape[3], K)['COLUMNS']
    loop = largest_loop(sass)
    assert loop.total() <= most_instructions * 2 * K * columns  # channels, rows, columns
    # What has been read is not read again.
    places = columns + K - 1 + (columns if backward else 0)
    assert sum(n for name, n in loop.items() if name.startswith('LDG')) == K * places
    return sass


CONVS = {  # K: registers and instructions of forward, of the weights' gradients
    3: ((96, 22), (112, 22)),
    5: ((168, 39), (208, 41)),
}


@pytest.mark.parametrize('K', [3, pytest.param(5, marks=pytest.mark.slow)])
def test_depthwise(K, tmp_path):
    sass = check_conv(conv.forward, conv_args(256, 64, K), '_conv', *CONVS[K][0], tmp_path)
    assert 'LDG.E.U16' not in sass and 'STG.E.U16' not in sass


@pytest.mark.slow
@pytest.mark.parametrize('K', CONVS)
def test_depthwise_weights(K, tmp_path):
    sass = check_conv(conv.backward, backward_args(256, 64, K), '_weights', *CONVS[K][1], tmp_path)
    assert 'LDG.E.U16' not in sass


@pytest.mark.slow
@pytest.mark.parametrize(
    'n, C, K, dtype',
    [
        (32, 2560, 3, torch.bfloat16),
        (256, 80, 3, torch.float16),
        (64, 112, 1, torch.bfloat16),
        (256, 40, 3, torch.float32),
        (64, 64, 7, torch.bfloat16),
        (1, 64, 5, torch.float32),
    ],
)
def test_depthwise_of_other_sizes(n, C, K, dtype, tmp_path):
    for fn, args in ((conv.forward, conv_args), (conv.backward, backward_args)):
        for name, _, _, stack in compiled(conv, fn, args(n, C, K, dtype), tmp_path):
            assert stack == 0, name
