"""Numba kernels on as many threads as torch has.

Numba's own layers keep a second team of threads: OpenMP's aborts in a forked worker, and both
teams spin while the other works. A kernel here is a plain function without the interpreter's
lock, and these threads sleep between calls.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

_pool = None


def _forget():
    """A forked process has none of the threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)


def run(kernel, tasks: int, *args):
    """Calls `kernel(first, last, *args)` for the parts of range(tasks), at once."""
    global _pool
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1:
        kernel(0, tasks, *args)
        return
    if _pool is None or _pool._max_workers < threads - 1:
        _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix='visionseq_mm')
    borders = [tasks * i // threads for i in range(threads + 1)]
    others = [_pool.submit(kernel, borders[i], borders[i + 1], *args) for i in range(1, threads)]
    kernel(borders[0], borders[1], *args)
    for other in others:
        other.result()
