"""Scan, convolution and mixer of Vim in Triton, against naive twins in float64."""

import pytest
import torch
import torch.nn.functional as F
from ops_twins import assert_close, normal, run, scan_twin

from visionseq_mm.ops import bidirectional_scan, conv1d_silu, selective_scan, vim_mixer
from visionseq_mm.ops.conv1d_silu import triton as conv_kernels
from visionseq_mm.ops.selective_scan import triton as scan_kernels

RATIO = 1e-5
EXTRAS = 'D', 'z', 'dt_bias'
SCANS = [  # L, D, N, reverse, extras
    (1, 5, 4, (False, True), EXTRAS),
    (7, 5, 1, (False,), ()),
    (7, 5, 40, (True,), EXTRAS),
    (63, 33, 16, (True,), ('z',)),
    (65, 5, 4, (False, False), ('D', 'dt_bias')),
    (33, 130, 4, (False, True), EXTRAS),
    (65, 33, 16, (True, False), ('z', 'dt_bias')),
    (34, 2, 3, (True, True), ('D',)),
    (130, 8, 16, (False,), EXTRAS),
]


def scan_inputs(L, D, N, S, extras=EXTRAS, B=1):
    """u, dt, A, B, C, D, z and dt_bias, None where absent."""
    u, dt, A, B, C, *rest = normal(
        *[(S, B, L, D)] * 2, (S, D, N), *[(S, B, L, N)] * 2, (S, D), (B, L, D), (S, D)
    )
    rest = (x if name in extras else None for name, x in zip(EXTRAS, rest, strict=True))
    return [u, dt, -A.abs(), B, C, *rest]


def present(fn, inputs):
    """`fn` as a function of those inputs that are there."""
    there = [i for i, x in enumerate(inputs) if x is not None]

    def call(*tensors):
        full = [None] * len(inputs)
        for i, x in zip(there, tensors, strict=True):
            full[i] = x
        return fn(*full)

    return call, [inputs[i] for i in there]


def directions_twin(reverse):
    def twin(u, dt, A, B, C, D, z, dt_bias):
        ys = []
        for s, flip in enumerate(reverse):
            u_, dt_, B_, C_ = (x[s].flip(1) if flip else x[s] for x in (u, dt, B, C))
            D_, bias = (None if x is None else x[s] for x in (D, dt_bias))
            y = scan_twin(u_, dt_, A[s], B_, C_, D_, None, bias)
            ys.append(y.flip(1) if flip else y)
        y = sum(ys) / len(ys)
        return y if z is None else y * F.silu(z)

    return twin


def directions(reverse):
    """The registered op, which takes any directions."""
    op = torch.ops.visionseq_mm.selective_scan
    return lambda *inputs: op(*inputs, list(reverse), 'triton')[0]


def check_scan(inputs, reverse, ratio=RATIO):
    twin, tensors = present(directions_twin(reverse), inputs)
    kernels, _ = present(directions(reverse), inputs)
    expected = run(twin, tensors)
    assert_close(run(kernels, [x.float() for x in tensors]), expected, ratio)


@pytest.mark.parametrize('L, D, N, reverse, extras', SCANS)
def test_scan(L, D, N, reverse, extras):
    check_scan(scan_inputs(L, D, N, len(reverse), extras, B=2 if L < 10 else 1), reverse)


def test_scan_whose_states_vanish_within_a_step():
    """What a step leaves of the state before is far below what it adds."""
    u, dt, _, *rest = scan_inputs(65, 5, 16, 1)
    A = -torch.arange(1, 17, dtype=torch.float64).expand(1, 5, 16)
    check_scan([u, dt + 2, A, *rest], (False,))


def test_public_scans():
    inputs = scan_inputs(7, 5, 3, 2)
    expected = run(directions_twin((False, True)), inputs)
    actual = run(
        lambda *xs: bidirectional_scan(*xs, backend='triton'), [x.float() for x in inputs]
    )
    assert_close(actual, expected, RATIO)
    one = [x if x is inputs[6] else x[0] for x in inputs]
    expected = run(lambda *xs: selective_scan(*xs, reverse=True, backend='reference'), one)
    actual = run(
        lambda *xs: selective_scan(*xs, reverse=True, backend='triton'), [x.float() for x in one]
    )
    assert_close(actual, expected, RATIO)


def test_scan_of_views_equals_that_of_copies():
    """Halves and slices of wider tensors, and a last dimension that is not dense."""
    u, dt, A, B, C, D, z, dt_bias = (x.float() for x in scan_inputs(7, 6, 4, 2))
    xz = torch.cat([z, z], -1)
    low_BC = torch.cat([B[..., :3], B, C], -1)
    views = [
        u.mT.contiguous().mT,
        dt.transpose(1, 2).contiguous().transpose(1, 2),
        A.mT.contiguous().mT,
        low_BC[..., 3:7],
        low_BC[..., 7:],
        D,
        xz[..., 6:],
        dt_bias,
    ]
    scan = directions((False, True))
    copies = [u, dt, A, B, C, D, z, dt_bias]
    for a, b in zip(run(scan, views), run(scan, copies), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('name', ['dt', 'z'])
def test_nan_spreads_along_the_scan(name, reverse):
    """One in a token and channel reaches those after it, and theirs before it backwards."""
    inputs = [x.float() for x in scan_inputs(34, 3, 2, 1)]
    at = ['u', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias'].index(name)
    inputs[at][..., 30, 1] = torch.nan
    spoilt = torch.zeros(1, 34, 3, dtype=torch.bool)
    spoilt[:, slice(30, 31) if name == 'z' else slice(31) if reverse else slice(30, None), 1] = 1
    out, states = scan_kernels.forward(*inputs, [reverse])
    assert torch.equal(out.isnan(), spoilt)

    dout = torch.ones_like(out)
    dout[:, 30, 2] = torch.nan
    inputs[at] = inputs[at].nan_to_num()
    out, states = scan_kernels.forward(*inputs, [reverse])
    du = scan_kernels.backward(dout, *inputs, states, [reverse])[0]
    spoilt = torch.zeros(1, 34, 3, dtype=torch.bool)
    spoilt[:, slice(30, None) if reverse else slice(31), 2] = 1
    assert torch.equal(du[0].isnan(), spoilt)


def conv_twin(reverse):
    def twin(x, weight, bias):
        out = []
        for w, b, flip in zip(weight, bias, reverse, strict=True):
            x_ = F.pad((x.flip(1) if flip else x).mT, (w.shape[1] - 1, 0))
            u = F.silu(F.conv1d(x_, w[:, None], b, groups=len(w))).mT
            out.append(u.flip(1) if flip else u)
        return torch.stack(out)

    return twin


@pytest.mark.parametrize(
    'B, L, D, W, reverse',
    [
        (2, 7, 5, 4, (False,)),
        (1, 1, 5, 3, (True,)),
        (2, 65, 33, 4, (False, True)),
        (1, 33, 130, 4, (True, False)),
        (1, 32, 8, 2, (True, True)),
        (1, 40, 8, 1, (False, False)),
    ],
)
def test_conv(B, L, D, W, reverse):
    S = len(reverse)
    inputs = normal((B, L, D), (S, D, W), (S, D))
    expected = run(conv_twin(reverse), inputs)
    actual = run(
        lambda *xs: conv1d_silu(*xs, reverse, backend='triton'), [x.float() for x in inputs]
    )
    assert_close(actual, expected, RATIO)


def test_conv_reads_and_writes_halves():
    xz, weight, bias, du = (
        x.float() for x in normal((1, 40, 10), (2, 5, 4), (2, 5), (2, 1, 40, 5))
    )
    reverse = [False, True]
    dxz = torch.zeros_like(xz)
    x, dx = xz.chunk(2, -1)[0], dxz.chunk(2, -1)[0]
    u = conv_kernels.forward(x, weight, bias, reverse)
    conv_kernels.backward(du, x, weight, bias, reverse, dx)
    x_, dx_ = x.contiguous(), torch.empty_like(dx)
    assert torch.equal(u, conv_kernels.forward(x_, weight, bias, reverse))
    conv_kernels.backward(du, x_, weight, bias, reverse, dx_)
    assert torch.equal(dx, dx_)
    assert not dxz.chunk(2, -1)[1].any()


def test_nan_spreads_as_far_as_the_taps():
    x, weight, bias = (t.float() for t in normal((1, 40, 5), (2, 5, 4), (2, 5)))
    x[:, 20, 1] = torch.nan
    spoilt = torch.zeros(2, 1, 40, 5, dtype=torch.bool)
    spoilt[0, :, 20:24, 1] = spoilt[1, :, 17:21, 1] = 1
    assert torch.equal(conv_kernels.forward(x, weight, bias, [False, True]).isnan(), spoilt)


@pytest.mark.parametrize('recompute', [True, False])
def test_mixer(recompute):
    B, L, D, E, R, N, S, W = 1, 35, 8, 20, 3, 4, 2, 4
    tokens, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, skip, out_proj = normal(
        (B, L, D),
        (2 * E, D),
        (S, E, W),
        (S, E),
        (S, R + 2 * N, E),
        (S, E, R),
        (S, E),
        (S, E, N),
        (S, E),
        (D, E),
    )
    inputs = [
        tokens,
        in_proj / 3,
        conv_weight,
        conv_bias,
        x_proj / 4,
        dt_proj,
        dt_bias,
        -A.abs(),
        skip,
        out_proj / 4,
    ]

    def mixer(backend):
        return lambda *xs: vim_mixer(*xs, recompute=recompute, backend=backend)

    expected = run(mixer('reference'), inputs)
    assert_close(run(mixer('triton'), [x.float() for x in inputs]), expected, RATIO)
