"""Compiled Triton kernels against the reference in float64; run by `make gpu`."""

import pytest
import torch
import torch.nn.functional as F

from visionseq_mm.ops import (
    cluster_attention,
    conv1d_silu,
    depthwise_conv2d,
    mlstm,
    rotary_2d,
    sec_attention,
    sec_partition,
    vil_mixer,
    vim_mixer,
)
from visionseq_mm.ops.vil_mixer import Weights
from visionseq_mm.ops.vil_mixer import reference as vil_reference

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


def compare(kernels, reference, inputs, dtype, slack=1, least=1e-12):
    actual, expected = results(kernels, inputs), results(reference, inputs, torch.float64)
    assert_close(actual, expected, dtype, 1, slack, least)


def assert_close(actual, expected, dtype, outputs, slack=1, least=1e-12):
    """The first so many are outputs, the others gradients; errors of `least` never matter."""
    ratios = [DTYPES[dtype][0]] * outputs + [DTYPES[dtype][1]] * (len(expected) - outputs)
    for n, (x, y, ratio) in enumerate(zip(actual, expected, ratios, strict=True)):
        assert x.isfinite().all(), f'tensor {n}'
        error, size = (t.square().mean().sqrt() for t in (x.double() - y, y))
        assert error <= slack * ratio * size + least, (
            f'tensor {n}: error {error:.1e} of {size:.1e}'
        )


def compare_with_rounding(kernels, reference, inputs, dtype):
    """For what multiplies rounding errors: four times those of the reference in `dtype` pass."""
    actual, rounded = results(kernels, inputs), results(reference, inputs)
    expected = results(reference, inputs, torch.float64)
    ratios = [DTYPES[dtype][0]] + [DTYPES[dtype][1]] * len(inputs)
    for n, (x, y, z, ratio) in enumerate(zip(actual, expected, rounded, ratios, strict=True)):
        assert x.isfinite().all(), f'tensor {n}'
        error, least = (t.norm() for t in (x.double() - y, z.double() - y))
        assert error <= 4 * least + ratio * y.norm(), f'tensor {n}: {error:.1e}, not {least:.1e}'


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


# Every type and width is compiled anew, for odd lengths too: only ViL-T has them all.
CELLS = [(S, 96) for S in LENGTHS]
CELLS += [(S, Dh) for S in (4096, 4097) for Dh in (192, 384)]
OTHER_HEADS = [(Dh, torch.bfloat16) for Dh in (1, 33, 64, 130, 256)]
OTHER_HEADS += [(33, torch.float32), (256, torch.float32), (100, torch.float16)]


def cell_inputs(S, dtype, device='cuda', B=2, H=4, Dh=96, i_gate=0.0, f_gate=None):
    """Gates in float32, forgetting as at the start of training unless told."""
    q, k, v = normal(*[(B, S, H, Dh)] * 3, dtype=dtype, device=device)
    i, f = normal(*[(B, S, H)] * 2, dtype=torch.float32, device=device)
    f_gate = torch.linspace(3, 6, H, device=device) if f_gate is None else f_gate
    return [q, k, v, i + i_gate, f + f_gate]


def cell(backend, reverse=False):
    return lambda *xs: mlstm(*xs, reverse, backend=backend)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('S, Dh', CELLS)
def test_cell(S, Dh, dtype):
    compare(cell('triton'), cell('reference'), cell_inputs(S, dtype, Dh=Dh), dtype)


@pytest.mark.parametrize('Dh, dtype', OTHER_HEADS)
def test_cell_of_other_heads(Dh, dtype):
    """Every size of a block of channels and number of them, rows of a tile and warps."""
    compare(cell('triton'), cell('reference'), cell_inputs(1023, dtype, Dh=Dh), dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('Dh', [96, 192, 384])
@pytest.mark.parametrize('S', [1023, 4097])
def test_reversed_cell(S, Dh, dtype):
    inputs = cell_inputs(S, dtype, Dh=Dh, H=3)
    compare(cell('triton', True), cell('reference', True), inputs, dtype)
    flipped = cell('triton')(*(x.flip(1) for x in inputs)).flip(1)
    assert torch.equal(cell('triton', True)(*inputs), flipped)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('i_gate, f_gate', [(0, -20), (0, -5), (-50, -20), (-50, 3)])
@pytest.mark.parametrize('Dh', [96, 384])
def test_cell_that_forgets_or_does_not_hear(Dh, i_gate, f_gate, dtype):
    inputs = cell_inputs(1023, dtype, Dh=Dh, i_gate=i_gate, f_gate=f_gate)
    # What is left of a token after the next, exp(−20), is no number of float16.
    least = 1e-6 if dtype == torch.float16 else 1e-12
    compare(cell('triton'), cell('reference'), inputs, dtype, least=least)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('opposite', [False, True])
@pytest.mark.parametrize('Dh', [96, 384])
def test_cell_with_normalisers_near_zero(Dh, opposite, dtype):
    """Where sums cancel: without a bound, for the input gates are wide open; or with the opposite
    of each key after it. Gradients are beyond the range of float16.
    """
    q, k, v, i, f = cell_inputs(1023, dtype, Dh=Dh, i_gate=50 if not opposite else 8, f_gate=12)
    if opposite:
        k[:, 1::2], i[:, 1::2] = -k[:, :-1:2] * 1.01, i[:, :-1:2]
    compare_with_rounding(cell('triton'), cell('reference'), [q, k, v, i, f], dtype)


def layer_inputs(grid, dtype, device='cuda', B=2, D=192, H=4, S=1, kernel=(3, 3)):
    """Tokens and weights, in the order of `Weights`."""
    E = 2 * D
    shapes = [(B, grid[0] * grid[1], D), (2 * E, D), (2 * E,), (S, E, *kernel), (S, E)]
    shapes += [(S, 3, E // 4, 4, 4), (S, 3, E), (S, 2 * H, 3 * E), (S, 2 * H), *[(S, E)] * 3]
    inputs = normal(*shapes, (D, E), (D,), dtype=torch.float32, device=device)
    tokens, up, up_bias, taps, conv_bias, qkv, qkv_bias, gates, *rest = inputs
    gates_bias, norm_weight, norm_bias, skip, down, down_bias = rest
    forget = torch.cat([torch.zeros(H), torch.linspace(3, 6, H)]).to(device)
    # The norm makes noise of h where it is small: no sums that cancel, and values of some size.
    qkv[:, :2], qkv_bias = qkv[:, :2] / 4, qkv_bias / 4 + 1
    qkv_bias[:, 2, ::2] -= 3
    taps = taps / taps[0, 0].numel()
    narrow = [tokens, up / D**0.5, up_bias / 4, taps, conv_bias / 4, qkv, qkv_bias]
    wide = [gates / E, gates_bias / 4 + forget, 1 + norm_weight / 4, norm_bias, skip]
    last = [down / E**0.5, down_bias / 4]
    return [*(x.to(dtype) for x in narrow), *wide, *(x.to(dtype) for x in last)]


def layer(backend, grid, reverse=(False,), columns=None, recompute=True):
    def run(tokens, *weights):
        weights = Weights(*weights)
        return vil_mixer(tokens, weights, grid, reverse, columns, recompute, backend)

    return run


@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'D, grid, kernel, reverse, columns',
    [
        (192, (1, 1), (3, 3), [False], [False]),
        (192, (64, 64), (3, 3), [True], [False]),
        (192, (31, 67), (3, 3), [True, False], [False, True]),
        (192, (1, 4097), (4,), [True], [False]),
        (384, (61, 67), (3, 3), [False], [False]),
        (768, (64, 64), (3, 3), [True], [False]),
    ],
)
def test_layer(D, grid, kernel, reverse, columns, dtype, recompute):
    """Every tensor between the steps is rounded too, and the gates' gradients mostly cancel."""
    inputs = layer_inputs(grid, dtype, D=D, S=len(reverse), kernel=kernel)
    way = grid, reverse, columns, recompute
    compare_with_rounding(layer('triton', *way), layer('reference', *way), inputs, dtype)


def part_inputs(grid, E, dtype, device='cuda', B=2, H=4, kernel=(3, 3)):
    """Arguments of the part before the cell, and gradients of what it returns."""
    L = grid[0] * grid[1]
    origin = (kernel[0] // 2, kernel[1] // 2) if kernel[0] > 1 else (0, kernel[1] - 1)
    tokens = normal((B, L, E), *[(B, L, E)] * 4, *[(B, L, H)] * 2, dtype=dtype, device=device)
    x, *grads = tokens
    shapes = (E, *kernel), (E,), (3, E // 4, 4, 4), (3, E)
    taps, conv_bias, qkv, qkv_bias = normal(*shapes, dtype=dtype, device=device)
    shapes = (2 * H, E), (2 * H, E), (2 * H,)
    *gates, gates_bias = normal(*shapes, dtype=torch.float32, device=device)
    weights = [taps / (kernel[0] * kernel[1]) ** 0.5, conv_bias, qkv / 2, qkv_bias]
    weights += [*(gate / E**0.5 for gate in gates), gates_bias]
    dc, dq, dk, dv, di, df = grads
    grads = [dc, *(d.unflatten(2, (H, -1)) for d in (dq, dk, dv)), di.float(), df.float()]
    return [x, *weights, grid, origin], grads


def doubled(args):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


def before_cell(parts, args, grads):
    """c, q, k, v, i, f; the gradients of x and of the weights."""
    x, taps, conv_bias, qkv, _, gates_c, gates_x, _, grid, origin = args
    outs, dx = parts.pre(*args), torch.empty_like(x)
    weights = taps, conv_bias, qkv, gates_c, gates_x
    return [*outs, dx, *parts.pre_backward(*grads, x, outs[0], *weights, grid, origin, dx)]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'E, grid, kernel, B',
    [
        (384, (1, 1), (3, 3), 1),
        (384, (7, 9), (3, 3), 3),
        (384, (61, 67), (3, 3), 1),
        (384, (64, 64), (3, 3), 8),
        (384, (1, 65), (1, 4), 2),
        (384, (1, 4097), (1, 4), 8),
        (100, (7, 9), (5, 5), 1),
        (768, (61, 67), (3, 3), 8),
        (1536, (61, 67), (3, 3), 8),
    ],
)
def test_part_before_the_cell(E, grid, kernel, B, dtype):
    from visionseq_mm.ops.vil_mixer import triton as kernels

    args, grads = part_inputs(grid, E, dtype, B=B, kernel=kernel)
    expected = before_cell(vil_reference, doubled(args), doubled(grads))
    actual = before_cell(kernels, args, grads)
    assert [x.dtype for x in actual[:7]] == [dtype] * 4 + [torch.float32] * 2 + [dtype]
    assert_close(actual, expected, dtype, 6)
    for x, y in zip(actual, before_cell(kernels, args, grads), strict=True):
        assert torch.equal(x, y)


def after_inputs(L, E, dtype, device='cuda', B=2, H=4):
    """Arguments of the part after the cell, and a gradient of its result."""
    h, c, z, dy = normal((B, L, H, E // H), *[(B, L, E)] * 3, dtype=dtype, device=device)
    norm = normal(*[(E,)] * 3, dtype=torch.float32, device=device)
    return [h, c, z, *norm, 1e-5], dy


def after_cell(parts, args, dy):
    """y; y again, the gradients of z, h, c and of the weights."""
    dz = torch.empty_like(args[2])
    y, *grads = parts.post_backward(dy, *args, dz)
    return [parts.post(*args), y, dz, *grads]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('E', [384, 768, 1536, 132])
@pytest.mark.parametrize('L, B', [(1, 1), (63, 3), (4097, 1), (4096, 8)])
def test_part_after_the_cell(L, B, E, dtype):
    from visionseq_mm.ops.vil_mixer import triton as kernels

    args, dy = after_inputs(L, E, dtype, B=B)
    expected = after_cell(vil_reference, doubled(args), dy.double())
    actual = after_cell(kernels, args, dy)
    assert_close(actual, expected, dtype, 2)
    for x, y in zip(actual, after_cell(kernels, args, dy), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('Dh', [96, 384])
def test_same_bits_of_cell_and_layer_twice(Dh, dtype):
    cases = [
        (cell('triton'), cell_inputs(4097, dtype, B=3, Dh=Dh)),
        (layer('triton', (64, 64), [True]), layer_inputs((64, 64), dtype, D=2 * Dh)),
    ]
    for fn, inputs in cases:
        first, second = (results(fn, inputs) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x, y)


# Tokens, heads and clusters of SecViT-S at 1024×1024, all of 32 channels.
STAGES = [(65536, 2, 32), (16384, 4, 8), (4096, 8, 2), (1024, 16, 1)]


def token_inputs(L, H, Dh, dtype, device='cuda', B=2):
    """q, k, v and what is added; v is a third of a wider tensor, as in the model."""
    shape = B, L, H, Dh
    q, k, lepe = normal(*[shape] * 3, dtype=dtype, device=device)
    (wide,) = normal((B, L, 3, H, Dh), dtype=dtype, device=device)
    return [q, k, wide[:, :, 2], lepe]


def some_valid(L, device='cuda'):
    """All tokens, every third, five, and none."""
    place = torch.arange(L, device=device)
    return torch.stack([place >= 0, place % 3 == 0, place % (L // 5) == 3, place < 0])


def attention(backend, idx, K, valid=None):
    return lambda q, k, v, lepe=None: sec_attention(q, k, v, idx, K, valid, backend, lepe)


def clusters_of(idx, K, valid=None):
    """(B, H, L): of each token, −1 without one."""
    counts = [idx.shape[2]] * len(idx) if valid is None else valid.sum(1).tolist()
    found = torch.full_like(idx, -1)
    for tokens, order, n in zip(found, idx.long(), counts, strict=True):
        for c in range(K):
            tokens.scatter_(1, order[:, c * n // K : (c + 1) * n // K], c)
    return found


def check_partition(k, K, valid=None):
    """Clusters are those of float64, but for tokens whose cosine is that of a border."""
    idx = sec_partition(k, K, valid, 'triton')
    assert idx.dtype == torch.int32 and idx.is_contiguous()
    everyone = torch.arange(idx.shape[2], dtype=torch.int32, device=idx.device)
    assert torch.equal(idx.sort(-1).values, everyone.expand_as(idx))
    assert torch.equal(idx, sec_partition(k, K, valid, 'triton'))
    exact = sec_partition(k.double(), K, valid, 'reference')
    wrong = clusters_of(idx, K, valid) != clusters_of(exact, K, valid)
    assert wrong.double().mean() < 1e-3
    for b in range(len(k)):
        keys = k[b].double() if valid is None else k[b].double()[valid[b]]
        n = len(keys)
        if not n:
            continue
        cosines = F.cosine_similarity(keys, keys.mean(0, keepdim=True), dim=-1).T
        borders = cosines.sort(-1).values[:, [c * n // K for c in range(K) if c * n // K < n]]
        tokens = everyone if valid is None else everyone[valid[b]]
        for h, row in enumerate(wrong[b][:, tokens.long()]):
            distance = (cosines[h, row, None] - borders[h]).abs().amin(-1)
            assert (distance < 2e-6).all(), f'sample {b}, head {h}: {distance.max():.1e}'
        if valid is not None:
            assert not wrong[b][:, ~valid[b]].any()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'L, H, K, Dh',
    [
        *((*stage, 32) for stage in STAGES),
        *((4097, 3, K, 32) for K in (2, 7, 33, 64)),
        *((1023, 3, 5, Dh) for Dh in (4, 16, 40, 64, 128)),
        (1, 2, 1, 16),
        (100, 2, 64, 16),
    ],
)
def test_partition(L, H, K, Dh, dtype):
    check_partition(token_inputs(L, H, Dh, dtype)[1], K)
    check_partition(token_inputs(L, H, Dh, dtype)[2], K)  # not contiguous


@pytest.mark.parametrize('L, K', [(4097, 5), (1024, 64), (65536, 32)])
@pytest.mark.parametrize('kinds', [1, 2, 7])
@pytest.mark.parametrize('zero', [False, True])
def test_ties_by_token_index(L, K, kinds, zero):
    """Equal keys have equal cosines wherever they stand; those of a key of zeros are 0."""
    (keys,) = normal((kinds, 3, 32), dtype=torch.float32)
    if zero:
        keys[0] = 0
    which = torch.randint(kinds, (2, L), device='cuda', generator=torch.Generator('cuda'))
    k = keys[which]
    exact = sec_partition(k.double(), K, backend='reference')
    found = sec_partition(k, K, backend='triton')
    assert torch.equal(clusters_of(found, K), clusters_of(exact, K))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('L, K', [(1023, 1), (1023, 7), (4097, 64)])
def test_partition_of_valid_tokens(L, K, dtype):
    valid = some_valid(L)
    k = token_inputs(L, 3, 32, dtype, B=4)[1]
    check_partition(k, K, valid)
    spoilt = k.masked_fill(~valid[:, :, None, None], torch.nan)
    expected, found = (sec_partition(x, K, valid, 'triton') for x in (k, spoilt))
    assert torch.equal(clusters_of(found, K, valid), clusters_of(expected, K, valid))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('L, H, K', STAGES)
def test_attention_of_the_stages(L, H, K, dtype):
    need_gigabytes(30)
    inputs = token_inputs(L, H, 32, dtype)
    idx = sec_partition(inputs[1], K, backend='reference')
    both = (attention(backend, idx, K) for backend in ('triton', 'reference'))
    compare(*both, inputs, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'L, K, Dh',
    [
        *((1023, 5, Dh) for Dh in (4, 16, 32, 40, 64, 128)),
        *((4097, K, 32) for K in (1, 2, 7, 33, 64)),
        (100, 64, 16),
        (63, 1, 64),
    ],
)
def test_attention_of_other_heads_and_clusters(L, K, Dh, dtype):
    """Clusters that differ in length by one; with nothing added."""
    inputs = token_inputs(L, 3, Dh, dtype)[:3]
    idx = sec_partition(inputs[1], K, backend='reference')
    both = (attention(backend, idx, K) for backend in ('triton', 'reference'))
    compare(*both, inputs, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('L, K', [(1023, 1), (1023, 7), (4097, 64)])
def test_attention_of_valid_tokens(L, K, dtype):
    """NaN elsewhere does not spread; samples with fewer tokens than clusters, and with none."""
    valid = some_valid(L)
    hidden = ~valid[:, :, None, None]
    inputs = token_inputs(L, 3, 32, dtype, B=4)
    idx = sec_partition(inputs[1], K, valid, 'reference')
    expected = results(attention('reference', idx, K, valid), inputs, torch.float64)
    spoilt = [x.masked_fill(hidden, torch.nan) for x in inputs]
    actual = results(attention('triton', idx, K, valid), spoilt)
    assert_close(actual, expected, dtype, 1)
    for x in actual:
        assert not x.masked_select(hidden).any()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('K', [1, 7])
def test_attention_of_views_equals_that_of_copies(K, dtype):
    """All of one projection, heads in another order, and a gradient that is expanded."""
    (wide,) = normal((2, 1023, 4, 32, 3), dtype=dtype)
    views = [*wide.unbind(-1), wide[..., 0].flip(2)]
    views += [wide.movedim(-1, 1)[:, 0], wide.transpose(2, 3).contiguous()[..., 1].transpose(2, 3)]
    idx = sec_partition(views[1], K, backend='reference')
    for q, k, v in (views[:3], views[3:], views[2:5]):
        found = []
        for copy in (False, True):
            inputs = [x.contiguous() if copy else x for x in (q, k, v)]
            inputs = [x.detach().requires_grad_() for x in inputs]
            out = attention('triton', idx, K)(*inputs)
            dout = wide[0, 0, 0, 0, 0].expand_as(out)
            dout = dout.contiguous() if copy else dout
            found.append([out, *torch.autograd.grad(out, inputs, dout)])
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [20, 100])
def test_attention_of_large_scores(size, dtype):
    """Beyond the range of an exponential; their rounding grows with them."""
    q, k, v, _ = token_inputs(1023, 2, 32, dtype)
    q, k = q * size**0.5, k * size**0.5
    idx = sec_partition(k, 4, backend='reference')
    both = (attention(backend, idx, 4) for backend in ('triton', 'reference'))
    compare(*both, [q, k, v], dtype, slack=size / 10)


def turned(backend):
    return lambda q, k: torch.stack(rotary_2d(q, k, backend))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'grid, H, Dh',
    [
        *(((256 >> i, 256 >> i), 2 << i, 32) for i in range(4)),
        *(((13, 67), 3, Dh) for Dh in (4, 16, 20, 40, 64, 128)),
        ((1, 1), 1, 32),
        ((1, 999), 5, 16),
    ],
)
def test_rotary(grid, H, Dh, dtype):
    wide = normal((2, *grid, 3, H, Dh), dtype=dtype)[0]
    inputs = [wide[:, :, :, i] for i in (0, 1)]
    compare(turned('triton'), turned('reference'), inputs, dtype)


def convolved(backend, residual):
    return lambda x, weight, bias: depthwise_conv2d(x, weight, bias, residual, backend)


def map_inputs(grid, C, side, dtype, device='cuda', B=2):
    shapes = (B, *grid, C), (C, 1, side, side), (C,)
    x, weight, bias = normal(*shapes, dtype=dtype, device=device)
    return [x, weight / side, bias]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'grid, C, side, residual',
    [
        ((256, 256), 64, 5, False),
        ((256, 256), 64, 3, True),
        ((256, 256), 192, 3, True),
        ((64, 64), 256, 5, False),
        ((64, 64), 768, 3, True),
        ((32, 32), 512, 5, False),
        *(((61, 67), 75, side, residual) for side in (1, 3, 5, 7) for residual in (False, True)),
        ((1, 1), 80, 5, False),
        ((2, 1023), 33, 3, True),
        ((1023, 1), 64, 5, False),
    ],
)
def test_depthwise(grid, C, side, residual, dtype):
    inputs = map_inputs(grid, C, side, dtype)
    both = (convolved(backend, residual) for backend in ('triton', 'reference'))
    compare(*both, inputs, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_same_bits_of_clusters_twice(dtype):
    def clustered(q, k, v, lepe):
        return cluster_attention(q, k, v, 32, backend='triton', lepe=lepe)

    cases = [
        (clustered, token_inputs(65536, 2, 32, dtype)),
        (clustered, token_inputs(4097, 5, 16, dtype)),
        (turned('triton'), normal(*[(2, 64, 63, 4, 32)] * 2, dtype=dtype)),
        (convolved('triton', True), map_inputs((255, 256), 192, 3, dtype)),
        (convolved('triton', False), map_inputs((255, 256), 64, 5, dtype)),
    ]
    for fn, inputs in cases:
        first, second = (results(fn, inputs) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x, y)


def vim_on(device):
    inputs = mixer_inputs(1023, torch.bfloat16, device)
    return lambda *xs: vim_mixer(*xs, backend='triton'), inputs


def cell_on(device):
    return cell('triton'), cell_inputs(1023, torch.bfloat16, device)


def vil_on(device):
    grid = 31, 33
    return layer('triton', grid, [True]), layer_inputs(grid, torch.bfloat16, device)


def clusters_on(device):
    inputs = token_inputs(1023, 3, 32, torch.bfloat16, device)
    return lambda q, k, v, lepe: cluster_attention(q, k, v, 8, None, 'triton', lepe), inputs


def masked_clusters_on(device):
    valid = some_valid(1023, device)
    inputs = token_inputs(1023, 3, 32, torch.bfloat16, device, B=4)
    return lambda q, k, v, lepe: cluster_attention(q, k, v, 8, valid, 'triton', lepe), inputs


def rotary_on(device):
    return turned('triton'), normal(*[(2, 31, 33, 3, 32)] * 2, dtype=torch.bfloat16, device=device)


def depthwise_on(device):
    return convolved('triton', True), map_inputs((31, 33), 96, 3, torch.bfloat16, device)


STEPS = dict(
    vim_mixer=vim_on,
    mlstm=cell_on,
    vil_mixer=vil_on,
    cluster_attention=clusters_on,
    cluster_attention_of_valid_tokens=masked_clusters_on,
    rotary_2d=rotary_on,
    depthwise_conv2d=depthwise_on,
)


def step(fn, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize('name', STEPS)
def test_in_a_cuda_graph(name):
    """Nothing in it waits for the device or depends on the stream."""
    fn, inputs = STEPS[name]('cuda')
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step(fn, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step(fn, inputs)
    graph.replay()
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 1e-2 * y.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize('name', STEPS)
def test_device_that_is_not_the_current_one(name):
    fn, inputs = STEPS[name]('cuda:1')
    with torch.cuda.device(1):
        expected = step(fn, inputs)
    assert torch.cuda.current_device() == 0
    for x, y in zip(step(fn, inputs), expected, strict=True):
        assert x.device == y.device
        assert torch.equal(x, y)


def need_gigabytes(count):
    if torch.cuda.mem_get_info()[0] < 1e9 * count:
        pytest.skip(f'needs {count} GB')


def test_more_elements_than_32_bits_count():
    """The last sequence of a large batch, as by itself."""
    need_gigabytes(90)
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


def test_cell_of_more_elements_than_32_bits_count():
    need_gigabytes(100)
    inputs = cell_inputs(2**19, torch.bfloat16, B=3, Dh=384)
    assert inputs[0].numel() > 2**31
    last = [x[-1:].contiguous() for x in inputs]
    whole = [x[-1:].clone() for x in step(cell('triton'), inputs)]
    for x, y in zip(whole, step(cell('triton'), last), strict=True):
        assert torch.equal(x, y)


def test_parts_of_more_elements_than_32_bits_count():
    from visionseq_mm.ops.vil_mixer import triton as kernels

    need_gigabytes(100)
    grid = 1024, 512
    args, grads = part_inputs(grid, 1536, torch.bfloat16, B=3)
    assert args[0].numel() > 2**31
    last = [args[0][-1:].contiguous(), *args[1:]], [d[-1:].contiguous() for d in grads]
    whole = [x[-1:].clone() for x in before_cell(kernels, args, grads)[:7]]
    for x, y in zip(whole, before_cell(kernels, *last), strict=False):
        assert torch.equal(x, y)
    del args, grads, last, whole
    args, dy = after_inputs(grid[0] * grid[1], 1536, torch.bfloat16, B=3)
    last = [*(x[-1:].contiguous() for x in args[:3]), *args[3:]], dy[-1:].contiguous()
    whole = [x[-1:].clone() for x in after_cell(kernels, args, dy)[:5]]
    for x, y in zip(whole, after_cell(kernels, *last), strict=False):
        assert torch.equal(x, y)


@pytest.mark.parametrize('name', ['cluster_attention', 'rotary_2d', 'depthwise_conv2d'])
def test_pyramid_of_more_elements_than_32_bits_count(name):
    need_gigabytes(110)
    dtype = torch.bfloat16
    if name == 'cluster_attention':
        inputs = token_inputs(65536, 2, 32, dtype, B=520)

        def fn(q, k, v, lepe):
            return cluster_attention(q, k, v, 32, backend='triton', lepe=lepe)

    elif name == 'rotary_2d':
        inputs = normal(*[(520, 256, 256, 2, 32)] * 2, dtype=dtype)

        def fn(q, k):
            return torch.cat(rotary_2d(q, k, 'triton'), -1)

    else:
        fn, inputs = convolved('triton', True), map_inputs((1024, 1024), 768, 3, dtype, B=3)
    assert inputs[0].numel() > 2**31
    last = [x[-1:].contiguous() if x.shape[0] == len(inputs[0]) else x for x in inputs]
    whole = [x[-1:].clone() for x in step(fn, inputs)]
    maps = 2 if name == 'depthwise_conv2d' else len(whole)  # not the gradients of weights
    for x, y in list(zip(whole, step(fn, last), strict=True))[:maps]:
        assert torch.equal(x, y)
