"""Compiled Triton kernels against the reference in float64; run by `make gpu`."""

import pytest
import torch

from visionseq_mm.ops import conv1d_silu, vim_mixer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]

LENGTHS = 1, 63, 1023, 4096, 4097, 16384
DTYPES = {
    torch.float32: (1e-5, 5e-5),  # RMS of errors against RMS: output, gradients
    torch.bfloat16: (5e-3, 1e-2),
    torch.float16: (5e-3, 1e-2),
}


def normal(*shapes, dtype, device='cuda'):
    generator = torch.Generator(device).manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


def scan_inputs(L, dtype, device='cuda', S=2, B=2, D=208, N=16):
    """Steps and decays as those of a network that begins to learn."""
    sequences = normal(
        *[(S, B, L, D)] * 2, *[(S, B, L, N)] * 2, (B, L, D), dtype=dtype, device=device
    )
    u, dt, B_, C, z = sequences
    D_, dt_bias, A = normal((S, D), (S, D), (S, D, N), dtype=torch.float32, device=device)
    A = -torch.arange(1, N + 1, device=device) * (1 + 0.1 * A).abs()
    return [u, dt, A, B_, C, D_, z, dt_bias - 4]


def scan(backend, reverse=(False, True)):
    op = torch.ops.visionseq_mm.selective_scan
    return lambda *inputs: op(*inputs, list(reverse), backend)[0]


def results(fn, inputs, dtype=None):
    """Output and gradients, of the inputs in another type if asked for."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = fn(*inputs)
    (dout,) = normal(out.shape, dtype=torch.bfloat16, device=out.device)  # exact in all types
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def compare(kernels, reference, inputs, dtype, slack=1):
    actual, expected = results(kernels, inputs), results(reference, inputs, torch.float64)
    ratios = [DTYPES[dtype][0]] + [DTYPES[dtype][1]] * len(inputs)
    for n, (x, y, ratio) in enumerate(zip(actual, expected, ratios, strict=True)):
        assert x.isfinite().all(), f'tensor {n}'
        error, size = (t.square().mean().sqrt() for t in (x.double() - y, y))
        assert error <= slack * ratio * size + 1e-12, (
            f'tensor {n}: error {error:.1e} of {size:.1e}'
        )


def test_scan_uses_the_compiler():
    triton = pytest.importorskip('triton')
    assert not triton.knobs.runtime.interpret


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('L', LENGTHS)
def test_scan(L, dtype):
    compare(scan('triton'), scan('reference'), scan_inputs(L, dtype), dtype)


@pytest.mark.parametrize(
    'N, reverse',
    [
        (1, (True,)),
        (5, (True, True)),
        (20, (True, False)),
        (64, (False, True)),
        (64, (True,)),
    ],
)
def test_scan_of_other_directions_and_states(N, reverse):
    inputs = scan_inputs(1023, torch.bfloat16, S=len(reverse), D=75, N=N)
    compare(scan('triton', reverse), scan('reference', reverse), inputs, torch.bfloat16)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('T, D', [(64, 1088), (128, 2048)])
def test_scan_of_longer_chunks(T, D, dtype):
    from visionseq_mm.ops.selective_scan.triton import chunk_length

    inputs = scan_inputs(4097, dtype, D=D)
    assert chunk_length(inputs[0]) == T
    compare(scan('triton'), scan('reference'), inputs, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_scan_without_extras(dtype):
    def bare(backend):
        return lambda *xs: scan(backend)(*xs, None, None, None)

    u, dt, *rest = scan_inputs(1023, dtype)
    compare(bare('triton'), bare('reference'), [u, dt - 4, *rest[:3]], dtype)


def test_scan_of_views_equals_that_of_copies():
    """Overlapping windows and a stride of 0, of inputs and of the output's gradient."""
    u, dt, A, _, C, D, z, dt_bias = scan_inputs(40, torch.bfloat16, N=64)
    (signal,) = normal((2, 2, 40 + 63), dtype=torch.bfloat16)
    windows, first, gate = signal.unfold(-1, 64, 1), C[:, :, :1], z[..., :1]
    views = [u, dt, A, windows, first.expand_as(C), D, gate.expand_as(z), dt_bias]
    for dout in (u[0, 0, 0, 0], u[0, 0, 0]):
        results = []
        for copy in (False, True):
            inputs = [x.contiguous() if copy else x for x in (*views, dout.expand_as(z))]
            *inputs, grad = (x.detach().requires_grad_() for x in inputs)
            out = scan('triton')(*inputs)
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_spreads_along_the_scan(dtype):
    """To the tokens after it in its channel, and backwards to those before it."""
    inputs = scan_inputs(1023, dtype)
    u = inputs[0].clone()
    u[0, 1, 500, 7] = torch.nan
    out = scan('triton')(u, *inputs[1:])
    spoilt = torch.zeros_like(out, dtype=torch.bool)
    spoilt[1, 500:, 7] = True
    assert torch.equal(out.isnan(), spoilt)

    u = inputs[0].clone().requires_grad_()
    dout = torch.ones_like(out)
    dout[1, 500, 7] = torch.nan
    (du,) = torch.autograd.grad(scan('triton')(u, *inputs[1:]), u, dout)
    spoilt = torch.zeros_like(du, dtype=torch.bool)
    spoilt[0, 1, :501, 7] = spoilt[1, 1, 500:, 7] = True
    assert torch.equal(du.isnan(), spoilt)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_same_bits_twice(dtype):
    inputs = scan_inputs(4097, dtype, B=3, D=384)
    first, second = (results(scan('triton'), inputs) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('L', LENGTHS)
def test_conv(L, dtype):
    inputs = normal((2, L, 200), (2, 200, 4), (2, 200), dtype=dtype)

    def conv(backend):
        return lambda *xs: conv1d_silu(*xs, backend=backend)

    compare(conv('triton'), conv('reference'), inputs, dtype)
    first, second = (results(conv('triton'), inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize('W, reverse', [(1, (True,)), (2, (True, False)), (3, (True, True))])
def test_conv_of_other_taps_and_directions(W, reverse):
    S = len(reverse)
    inputs = normal((2, 1023, 75), (S, 75, W), (S, 75), dtype=torch.bfloat16)

    def conv(backend):
        return lambda *xs: conv1d_silu(*xs, reverse, backend=backend)

    compare(conv('triton'), conv('reference'), inputs, torch.bfloat16)


def mixer_inputs(L, dtype, device='cuda', B=2, D=96, E=200, R=12, N=16, S=2, W=4):
    tokens, in_proj, conv_weight, conv_bias, x_proj, dt_proj, out_proj = normal(
        (B, L, D),
        (2 * E, D),
        (S, E, W),
        (S, E),
        (S, R + 2 * N, E),
        (S, E, R),
        (D, E),
        dtype=dtype,
        device=device,
    )
    _, _, A, _, _, skip, _, dt_bias = scan_inputs(1, dtype, device, S, B, E, N)
    return [
        tokens,
        in_proj / D**0.5,
        conv_weight / W**0.5,
        conv_bias,
        x_proj / E**0.5,
        dt_proj / R**0.5,
        dt_bias,
        A,
        skip,
        out_proj / E**0.5,
    ]


@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('L, R', [(1, 12), (1023, 24), (4097, 48)])
def test_mixer(L, R, dtype, recompute):
    """Beside the kernels, every tensor between the steps is rounded to the type of the inputs."""

    def mixer(backend):
        return lambda *xs: vim_mixer(*xs, recompute=recompute, backend=backend)

    inputs = mixer_inputs(L, dtype, R=R)
    compare(mixer('triton'), mixer('reference'), inputs, dtype, slack=3)


def mixer_step(inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = vim_mixer(*inputs, backend='triton')
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def test_mixer_in_a_cuda_graph():
    """Nothing in it waits for the device or depends on the stream."""
    inputs = mixer_inputs(1023, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = mixer_step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = mixer_step(inputs)
    graph.replay()
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 1e-2 * y.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_device_that_is_not_the_current_one():
    inputs = mixer_inputs(1023, torch.bfloat16, device='cuda:1')
    with torch.cuda.device(1):
        expected = mixer_step(inputs)
    assert torch.cuda.current_device() == 0
    for x, y in zip(mixer_step(inputs), expected, strict=True):
        assert x.device == y.device
        assert torch.equal(x, y)


def test_more_elements_than_32_bits_count():
    """The last sequence of a large batch, as by itself."""
    if torch.cuda.mem_get_info()[0] < 90e9:
        pytest.skip('needs 90 GB')
    L, D = 2**19, 1536
    inputs = scan_inputs(L, torch.bfloat16, S=1, B=3, D=D)
    assert inputs[0].numel() > 2**31
    reverse = [True]
    alone = [x[:, -1:].contiguous() if x.dim() == 4 else x for x in inputs]
    alone[6] = inputs[6][-1:].contiguous()
    with torch.no_grad():
        assert torch.equal(scan('triton', reverse)(*inputs)[-1:], scan('triton', reverse)(*alone))
    dout = inputs[6]
    du, ddt, last_du, last_ddt = (
        gradient
        for tensors, dout_ in ((inputs, dout), (alone, dout[-1:]))
        for gradient in gradients_of_sequences(tensors, dout_, reverse)
    )
    assert torch.equal(du[:, -1:], last_du)
    assert torch.equal(ddt[:, -1:], last_ddt)


def gradients_of_sequences(inputs, dout, reverse):
    u, dt, *rest = inputs
    u, dt = u.detach().requires_grad_(), dt.detach().requires_grad_()
    return torch.autograd.grad(scan('triton', reverse)(u, dt, *rest), [u, dt], dout)
