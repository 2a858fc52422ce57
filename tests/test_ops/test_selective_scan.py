import pytest
import torch
from ops_twins import assert_close, normal, run, scan_inputs, scan_twin

from visionseq_mm.ops import selective_scan


@pytest.mark.parametrize('present', [(), ('D',), ('z',), ('dt_bias',), ('z', 'dt_bias')])
def test_optional_inputs(present):
    *required, D, z, dt_bias = scan_inputs(70)
    options = {'D': D, 'z': z, 'dt_bias': dt_bias}

    def of(fn):
        return lambda *xs: fn(*xs[:5], **dict(zip(present, xs[5:], strict=True)))

    inputs = [*required, *(options[name] for name in present)]
    assert_close(run(of(selective_scan), inputs), run(of(scan_twin), inputs), 1e-10)


@pytest.mark.parametrize(('D', 'N'), [(1, 1), (33, 16), (130, 2)])
def test_widths(D, N):
    inputs = scan_inputs(65, D, N)
    assert_close(run(selective_scan, inputs), run(scan_twin, inputs), 1e-10)


def test_more_samples_than_a_step_takes():
    """The steps of a large batch run for some samples at a time."""
    shapes = [(5, 66, 300), (5, 66, 300), (300, 32), (5, 66, 32), (5, 66, 32)]
    u, dt, A, B, C = normal(*shapes)
    inputs = [u, dt, -A.abs(), B, C]
    assert_close(run(selective_scan, inputs), run(scan_twin, inputs), 1e-10)


@pytest.mark.parametrize('dt', [-50.0, 50.0, 1000.0])
def test_large_steps(dt):
    """Both ends of softplus; states that vanish at once or hardly move."""
    inputs = scan_inputs(130)
    inputs[1] = inputs[1] + dt
    expected = run(scan_twin, inputs)
    assert_close(run(selective_scan, inputs), expected, 1e-10)
    assert_close(run(selective_scan, [x.float() for x in inputs]), expected, 1e-4)


def test_bias_inside_skip_before_gate():
    """softplus(dt + dt_bias); D multiplies u, not the gated output."""
    u, dt, A, B, C, D, z, dt_bias = scan_inputs(9)
    gated = selective_scan(u, dt, A, B, C, D, z, dt_bias)
    y = selective_scan(u, dt + dt_bias, A, B, C) + D * u
    torch.testing.assert_close(gated, y * torch.nn.functional.silu(z))


def test_long_float32():
    inputs = scan_inputs(2000, D=8, N=16)
    expected = run(scan_twin, inputs)
    assert_close(run(selective_scan, [x.float() for x in inputs]), expected, 1e-5)
