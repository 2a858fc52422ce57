"""Which implementation of an op runs: the caller's argument, else an environment variable."""

import os
from types import ModuleType

ENV = 'VISIONSEQ_BACKEND'


class Backends:
    """The implementations of one op, best first: modules with the functions that the op calls.

    'auto' stands for the first of them.
    """

    def __init__(self, op: str, **modules: ModuleType):
        self.op = op
        self.modules = modules

    def __getitem__(self, name: str) -> ModuleType:
        return self.modules[name]

    def select(self, backend: str | None = None) -> str:
        """Name of the implementation to run.

        Raises:
            ValueError: no such implementation here; lists those there are.
        """
        source = 'backend'
        if backend is None:
            source, backend = ENV, os.environ.get(ENV) or 'auto'
        if backend == 'auto':
            return next(iter(self.modules))
        if backend not in self.modules:
            raise ValueError(
                f'{self.op}: {source}={backend!r} is unknown or not available here; '
                f'choose one of {["auto", *self.modules]}'
            )
        return backend
