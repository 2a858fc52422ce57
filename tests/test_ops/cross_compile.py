"""Triton's kernels compiled for sm_90, which needs no GPU: registers, spills and instructions."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('the interpreter has taken the place of the compiler', allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
TARGET = GPUTarget('cuda', 90, 32)
TYPES = {
    torch.bfloat16: '*bf16',
    torch.float16: '*fp16',
    torch.float32: '*fp32',
    torch.float64: '*fp64',
    torch.int32: '*i32',
    torch.int64: '*i64',
    torch.bool: '*i1',
}


def build(kernel, dtype, constants, data=(), odd=(), types=None, **options):
    """The kernel as it is compiled for tensors of `dtype`.

    Args:
        constants: Values of compile-time arguments.
        data: Tensors of `dtype`, without `_ptr`; the others are float32.
        odd: Arguments that 16 need not divide.
        types: Those of arguments that are neither such tensors nor int32, by name.
        options: num_warps, num_stages, …
    """
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
            continue
        pointer = name.endswith('_ptr')
        signature[name] = 'i32'
        if pointer:
            signature[name] = '*' + (dtype if name.removesuffix('_ptr') in data else 'fp32')
        signature[name] = (types or {}).get(name, signature[name])
        if name not in odd:
            divisible[i,] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=TARGET, options=options)


def launches(module, fn, *args):
    """What a function of tensors without data launches: kernels' names, their arguments by name,
    and the others, such as num_warps.
    """
    found = []

    class Kernel:
        def __init__(self, name, kernel):
            self.name, self.names = name, kernel.arg_names

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options):
            arguments = dict(zip(self.names, args, strict=False))
            assert not arguments.keys() & options.keys()
            arguments.update({name: options.pop(name) for name in self.names if name in options})
            assert arguments.keys() == set(self.names), self.name
            found.append((self.name, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in vars(module).items():
            if name.endswith('_kernel') and isinstance(kernel, JITFunction):
                patch.setattr(module, name, Kernel(name, kernel))
        fn(*args)
    return found


def build_launch(kernel, arguments, options):
    """The kernel as it is compiled for these arguments."""
    signature, constants, divisible = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        x = arguments[name]
        if kernel.params[i].is_constexpr or x is None or (isinstance(x, int) and x == 1):
            signature[name], constants[name] = 'constexpr', x
        elif isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
        else:
            signature[name] = 'fp32' if isinstance(x, float) else 'i32'
        if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
            divisible[i,] = [['tt.divisibility', 16]]
    divisible = {
        i: value for i, value in divisible.items() if kernel.arg_names[i[0]] not in constants
    }
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=TARGET, options=options)


def disassemble(compiled, tmp_path):
    """SASS, and the registers and bytes of stack of a thread."""
    cubin = tmp_path / 'kernel.cubin'
    cubin.write_bytes(compiled.asm['cubin'])
    usage, sass = (
        subprocess.run(
            [TOOLS / tool, option, cubin], capture_output=True, text=True, check=True
        ).stdout
        for tool, option in (('cuobjdump', '-res-usage'), ('nvdisasm', '-c'))
    )
    return sass, *(int(re.search(rf'{what}:(\d+)', usage)[1]) for what in ('REG', 'STACK'))


def loops(sass):
    """Instructions of each innermost loop, counted by their names."""
    instructions, labels, spans = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r'(\.L_x_\d+):', line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r'\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([\w.]+)(.*);', line):
            instructions.append(found[1])
            target = re.search(r'`\((\.L_x_\d+)\)', found[2])
            if target and target[1] in labels:
                spans.append((labels[target[1]], len(instructions)))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [Counter(instructions[slice(*span)]) for span in inner]
