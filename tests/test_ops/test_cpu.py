"""Numba's vectors and threads, and the whole backend against the reference."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ops_twins import assert_close, mixer_inputs, run

from visionseq_mm import ops
from visionseq_mm.ops import vim_mixer

pytest.importorskip('numba')

from visionseq_mm.ops import simd, threads, tiles
from visionseq_mm.ops.mlstm import cpu as mlstm_cpu
from visionseq_mm.ops.selective_scan import cpu as scan_cpu


@simd.jit
def _functions(x, exp2, sigmoid, softplus):
    for i in range(0, x.shape[0], 64 // x.itemsize):
        v = simd.load(x, (i,))
        simd.store(exp2, (i,), simd.exp2(v))
        simd.store(sigmoid, (i,), simd.sigmoid(v))
        simd.store(softplus, (i,), simd.softplus(v))


@simd.jit
def _sums(x, out):
    simd.store(out, (0,), simd.lane_sums(x, (0, 0)))


@pytest.mark.parametrize(('dtype', 'ratio'), [(np.float32, 5e-7), (np.float64, 1e-14)])
def test_functions(dtype, ratio):
    x = np.concatenate([np.linspace(-20, 20, 4000), np.geomspace(1e-30, 1, 96), np.zeros(64)])
    x = x.astype(dtype)
    results = [np.empty_like(x) for _ in range(3)]
    _functions(x, *results)
    wide = x.astype(np.longdouble)
    expected = np.exp2(wide), 1 / (1 + np.exp(-wide)), np.log1p(np.exp(wide))
    # The argument of an exponential is rounded, which counts the more the larger it is.
    slack = 1 + np.abs(wide)
    for actual, exact in zip(results, expected, strict=True):
        assert (np.abs(actual / exact - 1) / slack).max() < ratio
    assert (results[0][-64:] == 1).all()


def test_ends_and_nan():
    x = np.array([-1e30, -3e4, -500, 500, 3e4, 1e30, np.nan, np.nan] + [0] * 8, np.float32)
    x.view(np.uint32)[7] = 0xFFFFFFFF  # a NaN whose every bit is set
    exp2, sigmoid, softplus = (np.empty_like(x) for _ in range(3))
    _functions(x, exp2, sigmoid, softplus)
    assert (exp2[:3] < 1e-37).all()
    assert (exp2[3:6] > 1e38).all()
    assert (sigmoid[:3] < 1e-37).all()
    assert (sigmoid[3:6] == 1).all()
    assert (softplus[:3] < 1e-37).all()
    assert (softplus[3:6] == x[3:6]).all()
    for result in (exp2, sigmoid, softplus):
        assert np.isnan(result[6:8]).all()


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_lane_sums(dtype):
    lanes = 64 // np.dtype(dtype).itemsize
    x = np.random.default_rng(0).normal(size=(lanes, lanes)).astype(dtype)
    out = np.empty(lanes, dtype)
    _sums(x, out)
    np.testing.assert_allclose(out, x.sum(1), rtol=1e-5)


@simd.jit
def _products(c, a, b, turned, out, x, y):
    rows, columns, depth = c.shape[0], c.shape[1], b.shape[0]
    tiles.product(c[0:rows, 0:columns], a[0:rows, 0:depth], b[0:depth, 0:columns])
    tiles.add_product(c[0:rows, 0:columns], turned[0:depth, 0:rows].T, b[0:depth, 0:columns])
    tiles.transpose(out[0:columns, 0 : out.shape[1]], c[0:rows, 0:columns])
    lanes = 64 // c.itemsize
    tiles.dots(
        y, x[::-1, 0 : x.shape[1]], x[::-1, 0 : x.shape[1]], np.empty((lanes, lanes), c.dtype)
    )


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize(('rows', 'vectors', 'depth'), [(1, 1, 1), (4, 13, 5), (19, 6, 33)])
def test_tiles(dtype, rows, vectors, depth):
    """Any rows and depth, columns in whole vectors."""
    lanes = 64 // np.dtype(dtype).itemsize
    generator = np.random.default_rng(0)

    def new(*shape):
        return generator.normal(size=shape).astype(dtype)

    columns, padded = vectors * lanes, -(-rows // lanes) * lanes
    c, a, b, turned = (
        np.full((rows, columns), np.nan, dtype),
        new(rows, depth),
        new(depth, columns),
        new(depth, rows),
    )
    out, x, y = np.full((columns, padded), np.nan, dtype), new(rows, columns), new(padded)
    _products(c, a, b, turned, out, x, y)
    precision = dict(rtol=0, atol=1e-4 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(c, (a + turned.T) @ b, **precision)
    np.testing.assert_array_equal(out[:, :rows], c.T)
    assert (out[:, rows:] == 0).all()
    np.testing.assert_allclose(y[:rows], (x * x).sum(1)[::-1], rtol=1e-4)


@pytest.mark.parametrize(('dtype', 'ratio'), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize('count', [1, 2, 5])
def test_equals_the_reference_on_any_number_of_threads(dtype, ratio, count):
    inputs = [x.to(dtype) for x in mixer_inputs(200, D=48, N=16, R=3)]
    one = run(lambda *xs: vim_mixer(*xs, backend='cpu'), inputs)
    torch.set_num_threads(count)
    many = run(lambda *xs: vim_mixer(*xs, backend='cpu'), inputs)
    torch.set_num_threads(1)
    assert_close(many, one, ratio)  # torch's own matrix products depend on their number
    assert_close(many, run(lambda *xs: vim_mixer(*xs, backend='reference'), inputs), ratio)


def test_scan_does_not_depend_on_the_number_of_threads():
    u, z = torch.randn(2, 1, 200, 160), torch.randn(1, 200, 160)
    B, A = torch.randn(2, 1, 200, 4), -torch.rand(2, 160, 4)
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        out, states = scan_cpu.forward(u, u, A, B, B, None, z, None, [False, True])
        grads = scan_cpu.backward(out, u, u, A, B, B, None, z, None, states, [False, True])
        results.append([out, states, *grads])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_cell_does_not_depend_on_the_number_of_threads():
    q, k, v = torch.randn(3, 2, 300, 3, 24)
    i, f = torch.randn(2, 2, 300, 3)
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        h, sums = mlstm_cpu.forward(q, k, v, i, f, True, 1e-6)
        results.append([h, sums, *mlstm_cpu.backward(h, q, k, v, i, f, h, sums, True, 1e-6)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize('openmp', [True, False])
def test_tasks_are_shared_out_once(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(threads, '_openmp', None)
    seen = []
    torch.set_num_threads(3)
    threads.run(lambda first, last, x: seen.extend(range(first, last)), 8, None)
    assert sorted(seen) == list(range(8))
    with pytest.raises(ZeroDivisionError):
        threads.run(lambda first, last: 1 // (first - 2), 3)


def test_kernels_call_no_others():
    """Compiled kernels are kept under a checksum of the modules that they share."""
    shared = {f'visionseq_mm.ops.{name}' for name in simd.SHARED}
    files = list(Path(ops.__file__).parent.glob('*/cpu.py'))
    assert len(files) == 8
    for op in (file.parent.name for file in files):
        module = importlib.import_module(f'visionseq_mm.ops.{op}.cpu')
        compiled = [x for x in vars(module).values() if hasattr(x, 'py_func')]
        assert {x.py_func.__module__ for x in compiled} <= {*shared, module.__name__}


GENERIC = """
import numpy as np, torch
from visionseq_mm.ops import dispatch, simd, vim_mixer

torch.manual_seed(0)
shapes = [(1, 70, 8), (32, 8), (2, 16, 4), (2, 16), (2, 7, 16), (2, 16, 1), (2, 16)]
inputs = [0.3 * torch.randn(s) for s in shapes] + [-torch.rand(2, 16, 3), torch.randn(2, 16)]
inputs = [x.requires_grad_() for x in inputs + [torch.randn(8, 16)]]
results = []
for backend in ('cpu', 'reference'):
    out = vim_mixer(*inputs, backend=backend)
    results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

@simd.jit
def exp2(x):
    simd.store(x, (0,), simd.exp2(simd.load(x, (0,))))

x = np.array([0xFFFFFFFF, 0x7FC00001] + [0] * 14, np.uint32).view(np.float32)
exp2(x)
assert np.isnan(x[:2]).all() and (x[2:] == 1).all(), x
print(simd.AVX512)
"""


def test_without_avx512(tmp_path):
    """As on another processor, whose exponentials scale by adding to the exponent."""
    environment = dict(NUMBA_CPU_NAME='generic', NUMBA_CACHE_DIR=str(tmp_path))
    done = run_python(GENERIC, **environment)
    assert done.stdout.split() == ['False'], done.stderr


def test_a_numba_that_does_not_import(tmp_path):
    """The reference serves, and who asks for Numba is told why not."""
    (tmp_path / 'numba.py').write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    code = """
import torch
from visionseq_mm.ops import selective_scan
x, A, B = torch.randn(1, 9, 4), -torch.rand(4, 2), torch.randn(1, 9, 2)
selective_scan(x, x, A, B, B)
try:
    selective_scan(x, x, A, B, B, backend='cpu')
except ValueError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])])
    done = run_python(code, PYTHONPATH=path)
    assert 'does not import: Numba needs NumPy 2.3 or less' in done.stdout, done.stderr


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


FORKED = """
import os, torch
from visionseq_mm.ops import selective_scan

torch.set_num_threads(2)
x = torch.randn(1, 100, 64)
A, B = -torch.rand(64, 4), torch.randn(1, 100, 4)
expected = selective_scan(x, x, A, B, B, backend='cpu')
child = os.fork()
if not child:
    same = torch.equal(selective_scan(x, x, A, B, B, backend='cpu'), expected)
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_forked_worker():
    """A worker that was forked after the threads were started has to start its own."""
    done = run_python(FORKED)
    assert done.stdout.split() == ['0'], done.stderr
