"""Numba kernels on as many threads as torch has, and on torch's own where that can be.

A second team of threads, such as Numba's, would wait for its turn beside the first, which keeps
its cores busy for a while after each of its operations. So the kernels here are plain functions
without the interpreter's lock, and torch's OpenMP runtime calls them. It does not outlive a fork;
there, and without OpenMP, threads of our own do, which sleep between calls.
"""

import ctypes
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _find_openmp():
    """The process's OpenMP runtime, with the entry point that compiled code calls, or None."""
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    return library


_openmp = _find_openmp() if torch.backends.openmp.is_available() else None


@cache
def _pool(threads):
    return ThreadPoolExecutor(threads, thread_name_prefix='visionseq_mm')


def _forget():
    global _openmp
    _openmp = None
    _pool.cache_clear()


os.register_at_fork(after_in_child=_forget)


def run(kernel, tasks: int, *args):
    """Calls `kernel(first, last, *args)` for the parts of range(tasks), at once."""
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1:
        kernel(0, tasks, *args)
    elif _openmp:
        _run_on_openmp(kernel, tasks, threads, args)
    else:
        _run_on_pool(kernel, tasks, threads, args)


def _run_on_openmp(kernel, tasks, threads, args):
    errors = []

    def body(_):
        try:
            i, count = _openmp.omp_get_thread_num(), _openmp.omp_get_num_threads()
            kernel(tasks * i // count, tasks * (i + 1) // count, *args)
        except BaseException as error:  # must not pass through the runtime
            errors.append(error)

    _openmp.GOMP_parallel(_Body(body), None, threads, 0)
    if errors:
        raise errors[0]


def _run_on_pool(kernel, tasks, threads, args):
    borders = [tasks * i // threads for i in range(threads + 1)]
    parts = list(itertools.pairwise(borders))
    others = [_pool(threads - 1).submit(kernel, *part, *args) for part in parts[1:]]
    kernel(*parts[0], *args)
    for other in others:
        other.result()
