"""Which implementation of an op runs: the caller's argument, else an environment variable."""

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

ENV = 'VISIONSEQ_BACKEND'
TRITON = '3.4'  # at least, of whose language the kernels make use
INSTALLED = {name: find_spec(name) is not None for name in ('numba', 'triton')}


def _reference(x: Tensor) -> str | None:
    return None


@cache
def _numba() -> str | None:
    """What is wrong with Numba, or None."""
    try:
        import numba
    except Exception as error:  # it refuses a NumPy that is newer than itself, e.g.
        return f'needs Numba, which does not import: {error}'
    return 'needs Numba with its compiler' if numba.config.DISABLE_JIT else None


def _cpu(x: Tensor) -> str | None:
    if not INSTALLED['numba']:
        return "needs Numba: pip install 'visionseq_mm[cpu]'"
    if not torch.compiler.is_compiling() and _numba():
        return _numba()
    return None if x.device.type == 'cpu' else f'runs on a CPU, and the inputs are on {x.device}'


@cache
def _triton_version() -> str:
    import triton

    return triton.__version__


def _triton(x: Tensor) -> str | None:
    if not INSTALLED['triton']:
        return 'needs Triton: pip install triton'
    if not torch.compiler.is_compiling() and TorchVersion(_triton_version()) < TRITON:
        return f'needs Triton {TRITON}, which torch 2.8 has, or newer; found {_triton_version()}'
    if x.dtype == torch.float64:
        return 'has no float64'
    interpreted = x.device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1'
    if x.is_cuda or interpreted:
        return None
    return 'needs inputs on a GPU, or on a CPU with TRITON_INTERPRET=1 set before Python starts'


#: What keeps an implementation from taking a tensor, or None; best first.
OBSTACLES = {'triton': _triton, 'cpu': _cpu, 'reference': _reference}


class Backends:
    """The implementations of one op: modules of its package with the functions that it calls.

    They are imported when they are first used.

    Args:
        op: Name of the op, for messages.
        package: Where the modules are.
        names: Those there are.
    """

    def __init__(self, op: str, package: str, *names: str):
        self.op = op
        self.package = package
        self.names = [name for name in OBSTACLES if name in names]

    def __getitem__(self, name: str) -> ModuleType:
        return importlib.import_module(f'{self.package}.{name}')

    def select(self, backend: str | None, x: Tensor, **limits: str | None) -> str:
        """Name of the implementation to run.

        'auto' is the best one for `x`: Triton on a GPU, Numba on a CPU, else plain PyTorch.
        Triton's interpreter is too slow to be chosen by itself.

        Args:
            backend: 'auto', a name, or None for the environment's `VISIONSEQ_BACKEND`.
            x: A tensor of the type and on the device of the inputs.
            limits: What else keeps an implementation from taking these inputs, by its name.

        Raises:
            ValueError: no such implementation, or not for these inputs; lists those there are.
        """
        source = 'backend'
        if backend is None:
            source, backend = ENV, os.environ.get(ENV) or 'auto'
        obstacles = {name: OBSTACLES[name](x) or limits.get(name) for name in self.names}
        usable = [name for name, obstacle in obstacles.items() if obstacle is None]
        if backend == 'auto':
            return next(n for n in usable if n != 'triton' or x.device.type != 'cpu')
        if backend not in usable:
            why = f'is not available here: it {obstacles[backend]}' if backend in obstacles else ''
            raise ValueError(
                f'{self.op}: {source}={backend!r} {why or "is unknown"}; '
                f'choose one of {["auto", *reversed(usable)]}'
            )
        return backend
