"""The mixer and its convolution: what the suite of every op does not ask."""

import pytest
import torch
from ops_twins import (
    CASES,
    assert_close,
    conv_inputs,
    conv_twin,
    mixer_inputs,
    mixer_twin,
    run,
    run_and_count,
)

from visionseq_mm.ops import conv1d_silu, vim_mixer

BACKENDS = [case.backend for case in CASES if case.name == 'vim_mixer']
every_backend = pytest.mark.parametrize('backend', BACKENDS)


@every_backend
@pytest.mark.parametrize('W', [1, 2, 3, 4])
@pytest.mark.parametrize('reverse', [(False,), (True,), (True, False), (False, False)])
def test_conv_taps_and_directions(backend, W, reverse):
    x, weight, bias = conv_inputs(37, D=33, W=W)
    inputs = [x, weight[: len(reverse)], bias[: len(reverse)]]
    actual = run(lambda *xs: conv1d_silu(*xs, reverse, backend), inputs)
    assert_close(actual, run(lambda *xs: conv_twin(*xs, reverse), inputs), 1e-10)


@every_backend
@pytest.mark.parametrize('L', [1, 2, 3, 33])
def test_conv_shorter_than_its_taps(backend, L):
    inputs = conv_inputs(L, D=16)
    actual = run(lambda *xs: conv1d_silu(*xs, backend=backend), inputs)
    assert_close(actual, run(conv_twin, inputs), 1e-10)


def test_conv_bad_inputs():
    x, weight, bias = conv_inputs(7)
    with pytest.raises(ValueError, match=r'bias must be \(S, D\), got shape \(5,\)'):
        conv1d_silu(x, weight, bias[0])
    with pytest.raises(ValueError, match='6 taps, at most 4'):
        conv1d_silu(x, torch.cat([weight, weight[..., :2]], -1), bias)
    with pytest.raises(ValueError, match='3 directions, there are at most 2'):
        conv1d_silu(x, weight[[0, 1, 1]], bias[[0, 1, 1]], (False, True, True))
    with pytest.raises(ValueError, match=r'reverse=\(False,\) must have a value for each'):
        conv1d_silu(x, weight, bias, (False,))
    with pytest.raises(ValueError, match=r'weight has dtype torch\.float64'):
        conv1d_silu(x.float(), weight, bias.float())


@every_backend
@pytest.mark.parametrize(
    ('reverse', 'conv_reverse'),
    [((False,), None), ((True,), None), ((False, True), (False, False)), ((True, False), None)],
)
def test_directions(backend, reverse, conv_reverse):
    inputs = mixer_inputs(70, S=len(reverse))
    options = dict(reverse=reverse, conv_reverse=conv_reverse)
    actual = run(lambda *xs: vim_mixer(*xs, **options, backend=backend), inputs)
    assert_close(actual, run(lambda *xs: mixer_twin(*xs, **options), inputs), 1e-10)


@every_backend
@pytest.mark.parametrize(('D', 'N', 'R', 'W'), [(16, 16, 1, 4), (20, 4, 12, 3), (1, 1, 1, 1)])
def test_widths(backend, D, N, R, W):
    inputs = mixer_inputs(65, D, 2, N, R, W)
    actual = run(lambda *xs: vim_mixer(*xs, backend=backend), inputs)
    assert_close(actual, run(mixer_twin, inputs), 1e-10)


@every_backend
def test_recomputation_changes_nothing_but_memory(backend):
    inputs = [x.float() for x in mixer_inputs(130, D=16)]
    results, kept = zip(
        *(
            run_and_count(lambda *xs, r=r: vim_mixer(*xs, recompute=r, backend=backend), inputs)
            for r in (True, False)
        ),
        strict=True,
    )
    torch.testing.assert_close(*results, rtol=0, atol=0)
    states, inner = kept[0], 2 * 130 * 32
    assert 0 < states < inner
    # x, z, u of two directions, the gated mean; low, B and C.
    assert kept[1] - kept[0] == 5 * inner + 2 * 2 * 130 * (2 + 2 * 3)


@every_backend
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """Projections and convolution in its dtype, A, D and dt_bias as they are."""
    inputs = [x.float() for x in mixer_inputs(70)]

    def op(*xs):
        with torch.autocast('cpu', dtype):
            return vim_mixer(*xs, backend=backend)

    actual = run(op, inputs)
    assert [x.dtype for x in actual] == [dtype] + [torch.float32] * 10
    cast = [x if n in (6, 7, 8) else x.to(dtype) for n, x in enumerate(inputs)]
    expected = run(lambda *xs: vim_mixer(*xs, backend=backend), cast)
    torch.testing.assert_close(
        actual, [x.to(y.dtype) for x, y in zip(expected, actual, strict=True)]
    )
    assert_close(actual, run(mixer_twin, inputs), 5e-2)


@pytest.mark.parametrize(
    ('n', 'name'), [(1, 'in_proj'), (3, 'conv_bias'), (4, 'x_proj'), (5, 'dt_proj'), (7, 'A')]
)
def test_bad_shapes(n, name):
    inputs = mixer_inputs(7)
    inputs[n] = torch.cat([inputs[n], inputs[n]], -1)
    with pytest.raises(ValueError, match=r'vim_mixer: .* must .*got shape'):
        vim_mixer(*inputs)


def test_bad_inputs():
    inputs = mixer_inputs(7)
    with pytest.raises(ValueError, match=r'conv_reverse=\(False,\) must have a value for each'):
        vim_mixer(*inputs, conv_reverse=(False,))
    bad = list(inputs)
    bad[0] = bad[0].float()
    with pytest.raises(ValueError, match=r'in_proj has dtype torch\.float64, and beside tokens'):
        vim_mixer(*bad)
    bad = list(inputs)
    bad[7] = torch.full_like(bad[7], -torch.inf)
    with pytest.raises(ValueError, match='A must be finite, got -inf at'):
        vim_mixer(*bad)
    bad = list(inputs)
    bad[9] = bad[9].to('meta')
    with pytest.raises(ValueError, match=r'is on .*, the other inputs on'):
        vim_mixer(*bad)
    with pytest.raises(ValueError, match='reverse=True must have a value for each of the 2'):
        vim_mixer(*inputs, reverse=True)
    bad = list(inputs)
    bad[8] = bad[8][:, :-1]
    with pytest.raises(ValueError, match=r'vim_mixer: D must be \(S, E\)'):
        vim_mixer(*bad)


@every_backend
def test_a_trace_without_gradients_trains(backend):
    """It has no states to start the backward from, and computes them again."""
    inputs = [x.float() for x in mixer_inputs(70)]

    def op(*xs):
        return vim_mixer(*xs, backend=backend)

    traced = torch.jit.trace(op, tuple(x.requires_grad_() for x in inputs))
    with torch.no_grad():
        silent = torch.jit.trace(op, tuple(inputs))
    expected = run(op, inputs)
    for other in (traced, silent):
        torch.testing.assert_close(run(other, inputs), expected, rtol=0, atol=0)


def test_hidden_values_of_A_become_nan():
    """Where nobody can look at them, as in compiled code, they are no plausible number."""
    inputs = [x.float() for x in mixer_inputs(30)]
    inputs[7][0, 3, 1] = -torch.inf
    compiled = torch.compile(vim_mixer, fullgraph=True, backend='aot_eager')
    assert compiled(*inputs).isnan().any()
