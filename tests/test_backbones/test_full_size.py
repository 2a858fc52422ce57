"""Whole images of 1024 x 1024 through the tiny models."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from visionseq_mm import backbones

GRIDS = {
    'Vim': [(192, 64, 64)] * 4,
    'ViL': [(192, 64, 64)] * 4,
    'SecViT': [(64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32)],
}
#: MiB that a training step in float32 may add to a process: a tenth above what was measured.
BUDGET = 2600


@pytest.mark.parametrize('name', GRIDS)
def test_forward(name):
    torch.manual_seed(0)
    with torch.inference_mode():
        maps = getattr(backbones, name)().eval()(torch.randn(1, 3, 1024, 1024))
    assert [tuple(m.shape[1:]) for m in maps] == GRIDS[name]
    assert all(m.isfinite().all() for m in maps)


STEP = """
import json, resource, sys, time
import torch
from visionseq_mm import backbones

def peak():
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == 'darwin' else 2**10)

torch.set_num_threads(1)
torch.manual_seed(0)
model = getattr(backbones, sys.argv[1])(**json.loads(sys.argv[2]))
model(torch.randn(1, 3, 64, 64))  # what is compiled or started once is not counted
start, before = time.perf_counter(), peak()
maps = model(torch.randn(1, 3, 1024, 1024))
sum(m.square().mean() for m in maps).backward()
finite = all(p.grad.isfinite().all().item() for p in model.parameters())
print(json.dumps([finite, time.perf_counter() - start, before, peak()]))
"""


def step(name, **arguments):
    """MiB that image, activations and gradients add to a process of its own, at the peak."""
    # glibc returns freed tensors of a megabyte and more at once, so that the peak is theirs.
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(2**20)}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', STEP, name, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    finite, seconds, before, peak = json.loads(done.stdout.splitlines()[-1])
    print(
        f'\n{name} tiny, forward and backward of 1 x 1024 x 1024, {arguments}: '
        f'{seconds:.1f} s, peak {peak:.0f} MiB, {before:.0f} MiB before the image'
    )
    assert finite
    return peak - before


@pytest.mark.slow
@pytest.mark.parametrize('name', GRIDS)
def test_forward_and_backward(name, capsys):
    """Memory is linear in the tokens, and much less with recomputation."""
    with capsys.disabled():
        levels = [dict(recompute='none'), dict(recompute='kernel'), dict(with_cp=True)]
        added = [step(name, **level) for level in levels]
    assert added[0] < BUDGET
    # A ViL layer keeps its cells' output, twice its input; what SecViT's blocks keep is little
    # beside what one of them needs while it is computed again.
    bounds = dict(ViL=(0.7, 0.7), SecViT=(0.6, 1)).get(name, (0.6, 0.6))
    for (more, less), bound in zip(pairwise(added), bounds, strict=True):
        assert less < bound * more
