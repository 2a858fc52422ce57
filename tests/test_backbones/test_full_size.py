"""Whole images of 1024 x 1024 through the tiny models; `-s` shows time and peak memory."""

import json
import subprocess
import sys

import pytest

GRIDS = {
    'Vim': [[192, 64, 64]] * 4,
    'ViL': [[192, 64, 64]] * 4,
    'SecViT': [[64, 256, 256], [128, 128, 128], [256, 64, 64], [512, 32, 32]],
}
#: MiB of a training step, model and image included. A tenth to a third above what was measured.
BUDGETS = {'Vim': 3600, 'ViL': 4600, 'SecViT': 3800}
STEP = """
import json, resource, sys, time
import torch
from visionseq_mm import backbones

def peak():
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == 'darwin' else 2**10)

name, training = sys.argv[1], sys.argv[2] == 'training'
torch.manual_seed(0)
model = getattr(backbones, name)()
start, before = time.perf_counter(), peak()
with torch.set_grad_enabled(training):
    maps = model.train(training)(torch.randn(1, 3, 1024, 1024))
    if training:
        sum(m.square().mean() for m in maps).backward()
print(json.dumps(dict(
    shapes=[m.shape[1:] for m in maps],
    finite=all(m.isfinite().all().item() for m in maps),
    gradients=all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        if training else None,
    seconds=time.perf_counter() - start,
    before=before,
    peak=peak(),
)))
"""


def run(name, mode):
    """In a process of its own, whose peak is that of this model."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', STEP, name, mode], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f'\n{name} tiny, {mode}, 1 x 1024 x 1024: {result["seconds"]:.1f} s, peak '
        f'{result["peak"]:.0f} MiB, of which {result["before"]:.0f} before the image'
    )
    assert result['shapes'] == GRIDS[name]
    assert result['finite']
    return result


@pytest.mark.parametrize('name', GRIDS)
def test_forward(name):
    """Linear memory: attention over all 4096 tokens would hold 4 x 4096 x 4096 numbers."""
    result = run(name, 'testing')
    assert result['peak'] < 1300


@pytest.mark.slow
@pytest.mark.parametrize('name', GRIDS)
def test_forward_and_backward(name):
    result = run(name, 'training')
    assert result['gradients']
    assert result['peak'] < BUDGETS[name]
