import pytest
import torch
from ops_twins import (
    INSTALLED,
    assert_close,
    both_inputs,
    both_twin,
    normal,
    run,
    scan_inputs,
    scan_twin,
)

from visionseq_mm.ops import bidirectional_scan, selective_scan


@pytest.fixture(params=['reference', 'cpu'], autouse=True)
def backend(request, monkeypatch):
    if request.param == 'cpu' and not INSTALLED['numba']:
        pytest.skip('needs Numba')
    monkeypatch.setenv('VISIONSEQ_BACKEND', request.param)


@pytest.mark.parametrize('present', [(), ('D',), ('z',), ('dt_bias',), ('z', 'dt_bias')])
@pytest.mark.parametrize(
    ('op', 'twin', 'inputs'),
    [(selective_scan, scan_twin, scan_inputs), (bidirectional_scan, both_twin, both_inputs)],
    ids=['one', 'both'],
)
def test_optional_inputs(op, twin, inputs, present):
    *required, D, z, dt_bias = inputs(70)
    options = {'D': D, 'z': z, 'dt_bias': dt_bias}

    def of(fn):
        return lambda *xs: fn(*xs[:5], **dict(zip(present, xs[5:], strict=True)))

    inputs = [*required, *(options[name] for name in present)]
    assert_close(run(of(op), inputs), run(of(twin), inputs), 1e-10)


@pytest.mark.parametrize(('D', 'N'), [(1, 1), (33, 16), (130, 2), (7, 20)])
def test_widths(D, N):
    inputs = scan_inputs(65, D, N)
    assert_close(run(selective_scan, inputs), run(scan_twin, inputs), 1e-10)


def test_more_samples_than_a_step_takes():
    """The reference's steps of a large batch run for some samples at a time."""
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


def test_growing_states():
    """A positive A: up to the largest numbers, and then infinite or NaN, no smaller number."""
    inputs = scan_inputs(20)
    inputs[2] = inputs[2].abs()
    assert_close(run(selective_scan, inputs), run(scan_twin, inputs), 1e-10)
    inputs[2] = inputs[2] + 1e4
    out = selective_scan(*(x.float() for x in inputs))
    assert not (out[:, -1].isfinite() & (out[:, -1].abs() < 1e30)).any()


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


def test_both_directions_are_two_scans():
    u, dt, A, B, C, D, z, dt_bias = both_inputs(130)
    ys = [
        selective_scan(u[s], dt[s], A[s], B[s], C[s], D[s], dt_bias=dt_bias[s], reverse=bool(s))
        for s in (0, 1)
    ]
    expected = sum(ys) / 2 * torch.nn.functional.silu(z)
    torch.testing.assert_close(bidirectional_scan(u, dt, A, B, C, D, z, dt_bias), expected)


def test_one_direction_is_not_both():
    inputs = [x[:1] if n != 6 else x for n, x in enumerate(both_inputs(7))]
    with pytest.raises(ValueError, match=r'u must be \(2, B, L, D\), got shape \(1, '):
        bidirectional_scan(*inputs)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_A_has_to_be_finite(value):
    inputs = scan_inputs(7)
    inputs[2][3, 1] = value
    with pytest.raises(ValueError, match=rf'A must be finite, got {value} at \(3, 1\) and 1 such'):
        selective_scan(*inputs)


@pytest.mark.parametrize('n', range(8))
def test_one_dtype(n):
    """Sequences share one; parameters may be wider beside half precision, never narrower."""
    inputs = [x.float() for x in scan_inputs(7)]
    name = ('u', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias')[n]
    for dtype in (torch.float64, torch.bfloat16):
        mixed = list(inputs)
        mixed[n] = inputs[n].to(dtype)
        culprit = 'dt' if n == 0 else name
        with pytest.raises(ValueError, match=f'{culprit} has dtype torch.*beside u of'):
            selective_scan(*mixed)
