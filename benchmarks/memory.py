"""Peak memory of a call, and what it keeps for its backward pass.

As a program, what a backbone adds to a process of its own:
``python -m benchmarks.memory vim-tiny --size 1024 --step``.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Size, parse_size, sides

MIB = 2**20


def cuda_peak(call: Callable[[], object], device: torch.device) -> float:
    """MiB that `call` needs at its peak beyond what is allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def kept(call: Callable[[], object], weights: Iterable[Tensor]) -> float:
    """MiB that autograd saves for the backward pass of `call`, `weights` aside.

    A storage that several operations save counts once.
    """
    saved: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    # The graph of `out` holds what was saved, so no address was used twice.
    own = {w.untyped_storage().data_ptr() for w in weights}
    del out
    return sum(size for pointer, size in saved.items() if pointer not in own) / MIB


# --------------------------------------------------------------------- processes


def process_peak(
    model: str,
    size: Size,
    batch: int,
    step: bool,
    threads: int,
    precision: str,
) -> float:
    """MiB that one call of a backbone adds, at its peak, to a CPU process of its own.

    Raises:
        MemoryError: The process was killed.
        RuntimeError: It failed otherwise.
    """
    command = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.memory', model]
    command += ['--size', 'x'.join(map(str, sides(size))), '--batch', str(batch)]
    command += ['--threads', str(threads), '--precision', precision]
    # glibc returns freed tensors of a megabyte and more at once, so that the peak is theirs.
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(MIB), 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(
        command + ['--step'] * step,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode < 0:
        raise MemoryError
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ['no message'])[-1])
    return json.loads(done.stdout.splitlines()[-1])['added_mib']


def _forget_peak() -> None:
    """Lets this process's peak begin at what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def _peak() -> float:
    """MiB resident at this process's peak."""
    with contextlib.suppress(OSError):
        found = re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())
        if found:
            return int(found[1]) / 2**10
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (MIB if sys.platform == 'darwin' else 2**10)


def main():
    from benchmarks.models import Runner

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', help='as for benchmarks.backbones')
    parser.add_argument('--size', type=parse_size, required=True, help='pixels: N or HxW')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--step', action='store_true', help='a training step, not a forward')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--precision', default='float32', help='as for benchmarks.backbones')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runner = Runner(args.model, torch.device('cpu'), args.precision)
    call = runner.step if args.step else runner.forward
    call(runner.image(64, 1))  # kernels are compiled and threads started before the baseline
    gc.collect()
    _forget_peak()
    before = _peak()
    call(runner.image(args.size, args.batch))
    after = _peak()
    print(json.dumps(dict(before_mib=before, peak_mib=after, added_mib=after - before)))


if __name__ == '__main__':
    main()
