"""The parts of the ViL layer in Triton, against plain PyTorch in float64."""

import pytest
import torch
from ops_twins import assert_close, layer_inputs, normal, on_grid, run

from visionseq_mm.ops.vil_mixer import reference
from visionseq_mm.ops.vil_mixer import triton as kernels

RATIO = {torch.float32: 1e-5, torch.float16: 5e-3}
EPS = 1e-5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several programs, steps of each, and channels beside those of the last tile."""
    small = dict(FULL=4, TOKENS_WEIGHTS=16, CHANNELS=64, CHANNELS_WIDE=32, NORM_TILE=128)
    for name, value in small.items():
        monkeypatch.setattr(kernels, name, value)


def layer(B, grid, E, H, kernel, dtype=torch.float32, reverse=False):
    """Arguments of `pre`, and gradients of what it returns; a kernel (1, W) is of a sequence."""
    if kernel[0] == 1:
        grid, origin = (1, grid[0] * grid[1]), (0, 0 if reverse else kernel[1] - 1)
    else:
        origin = kernel[0] // 2, kernel[1] // 2
    L = grid[0] * grid[1]
    shapes = [(B, L, E), (E, *kernel), (E,), (3, E // 4, 4, 4), (3, E)]
    shapes += [*[(2 * H, E)] * 2, (2 * H,)]
    grads = [(B, L, E), *[(B, L, H, E // H)] * 3, *[(B, L, H)] * 2]
    x, taps, conv_bias, qkv, qkv_bias, *gates, dc, dq, dk, dv, di, df = normal(*shapes, *grads)
    gates[0], gates[1] = gates[0] / E**0.5, gates[1] / E**0.5
    taps = taps / (kernel[0] * kernel[1]) ** 0.5
    inputs = [t.to(dtype) for t in (x, taps, conv_bias, qkv / 2, qkv_bias)]
    inputs += [t.float() for t in gates]
    grads = [t.to(dtype) for t in (dc, dq, dk, dv)] + [di.float(), df.float()]
    return [*inputs, grid, origin], grads


def wide(args):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


def pre_backward(parts, args, grads, c=None, dx=None):
    """dx and the gradients of the weights."""
    x, taps, conv_bias, qkv, _, gates_c, gates_x, _, grid, origin = args
    c = parts.pre(*args)[0] if c is None else c
    dx = torch.empty_like(x) if dx is None else dx
    weights = taps, conv_bias, qkv, gates_c, gates_x
    return dx, *parts.pre_backward(*grads, x, c, *weights, grid, origin, dx)


LAYERS = [  # grid, E, H, kernel, reverse
    ((1, 1), 8, 1, (3, 3), False),
    ((3, 5), 24, 2, (3, 3), False),
    ((7, 9), 24, 1, (5, 5), False),
    ((9, 8), 96, 4, (3, 3), False),
    ((1, 65), 8, 2, (1, 4), False),
    ((1, 65), 24, 2, (1, 4), True),
    ((17, 3), 12, 1, (3, 3), False),
    ((2, 3), 40, 10, (7, 7), False),
]


@pytest.mark.parametrize('grid, E, H, kernel, reverse', LAYERS)
def test_pre(grid, E, H, kernel, reverse):
    batch = 2 if grid[0] * grid[1] < 30 else 1
    args, grads = layer(batch, grid, E, H, kernel, reverse=reverse)
    expected = reference.pre(*wide(args))
    actual = kernels.pre(*args)
    assert all(t.is_contiguous() for t in actual)
    assert_close(actual, expected, RATIO[torch.float32])
    expected = pre_backward(reference, wide(args), wide(grads))
    assert_close(pre_backward(kernels, args, grads), expected, RATIO[torch.float32])


def test_pre_in_half_precision():
    dtype = torch.float16
    args, grads = layer(2, (4, 9), 24, 2, (3, 3), dtype)
    expected = reference.pre(*wide(args))
    actual = kernels.pre(*args)
    assert [t.dtype for t in actual] == [dtype] * 4 + [torch.float32] * 2
    assert_close(actual, expected, RATIO[dtype])
    actual = pre_backward(kernels, args, grads)
    assert all(t.dtype == torch.float32 for t in actual[1:])
    assert_close(actual, pre_backward(reference, wide(args), wide(grads)), RATIO[dtype])


def norm(B, L, E, H, dtype=torch.float32):
    """Arguments of `post`, and a gradient of its result."""
    shapes = [(B, L, H, E // H), *[(B, L, E)] * 2, *[(E,)] * 3, (B, L, E)]
    h, c, z, weight, bias, skip, dy = normal(*shapes)
    h = h + 3
    args = [*(t.to(dtype) for t in (h, c, z)), weight.float(), bias.float(), skip.float(), EPS]
    return args, dy.to(dtype)


def post_backward(parts, args, dy, dz=None):
    dz = torch.empty_like(args[2]) if dz is None else dz
    return dz, *parts.post_backward(dy, *args, dz)


@pytest.mark.parametrize('dtype', RATIO)
@pytest.mark.parametrize('L, E, H', [(1, 8, 2), (15, 24, 1), (63, 8, 1), (17, 96, 4)])
def test_post(L, E, H, dtype):
    args, dy = norm(2, L, E, H, dtype)
    expected = reference.post(*wide(args))
    assert_close([kernels.post(*args)], [expected], RATIO[dtype])
    actual = post_backward(kernels, args, dy)
    assert [t.dtype for t in actual] == [dtype] * 4 + [torch.float32] * 3
    assert_close(actual, post_backward(reference, wide(args), dy.double()), RATIO[dtype])


def halves(x):
    """x as a half of a wider tensor, and a half to be written, of zeros beside zeros."""
    return torch.cat([x, x], -1)[..., x.shape[-1] :], torch.zeros_like(torch.cat([x, x], -1))


def test_views_equal_copies():
    args, grads = layer(2, (3, 9), 24, 2, (3, 3))
    x, dxz = halves(args[0])
    views = [x, *args[1:]]
    for a, b in zip(kernels.pre(*views), kernels.pre(*args), strict=True):
        assert torch.equal(a, b)
    dx = dxz[..., :24]
    views[1], views[3] = views[1].mT.contiguous().mT, views[3].mT.contiguous().mT
    strided = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in grads]
    expected = pre_backward(kernels, args, grads)
    for a, b in zip(pre_backward(kernels, views, strided, dx=dx), expected, strict=True):
        assert torch.equal(a, b)
    assert not dxz[..., 24:].any()

    args, dy = norm(2, 7, 24, 2)
    z, dxz = halves(args[2])
    views = [args[0].mT.contiguous().mT, args[1], z, *args[3:]]
    assert torch.equal(kernels.post(*views), kernels.post(*args))
    dz = dxz[..., 24:]
    expected = post_backward(kernels, args, dy)
    strided = dy.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(post_backward(kernels, views, strided, dz), expected, strict=True):
        assert torch.equal(a, b)
    assert not dxz[..., :24].any()


def test_same_bits_every_time():
    args, grads = layer(1, (3, 9), 24, 2, (3, 3))
    for a, b in zip(*(pre_backward(kernels, args, grads) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_nan_spreads_as_far_as_the_taps():
    """To the tokens around, in q and k to the channels of a block, and to their gates."""
    args, _ = layer(1, (6, 9), 24, 2, (3, 3))
    args[0][0, 2 * 9 + 8, 5] = torch.nan
    c, q, k, v, i, f = kernels.pre(*args)
    around = torch.zeros(6, 9, dtype=torch.bool)
    around[1:4, 7:] = True
    assert torch.equal(c[0, :, 5].isnan(), around.flatten())
    assert c.isnan().sum() == 6
    for part in (q, k):
        assert torch.equal(part.isnan().flatten(2), around.view(1, -1, 1) & in_block(5, 24))
    assert v.isnan().flatten(2).nonzero().tolist() == [[0, 26, n] for n in range(4, 8)]
    for gate in (i, f):
        assert torch.equal(gate.isnan(), around.view(1, -1, 1).expand(gate.shape))


def in_block(channel, E):
    return torch.arange(E) // 4 == channel // 4


def test_nan_in_the_backward():
    args, grads = layer(1, (6, 9), 24, 2, (3, 3))
    grads[3][0, 26, 0, 5] = torch.nan  # of v
    dx, dtaps, dconv_bias, dqkv, dqkv_bias, *_ = pre_backward(kernels, args, grads)
    assert dx.isnan().nonzero().tolist() == [[0, 26, n] for n in range(4, 8)]
    assert not dtaps.isnan().any() and not dconv_bias.isnan().any()
    assert dqkv.isnan().nonzero().tolist() == [[2, 1, 1, n] for n in range(4)]
    assert dqkv_bias.isnan().nonzero().tolist() == [[2, 5]]


def test_nan_stays_in_its_token_and_head():
    args, dy = norm(1, 9, 24, 3)
    args[0][0, 4, 1, 2] = torch.nan
    spoilt = torch.zeros(1, 9, 24, dtype=torch.bool)
    spoilt[:, 4, 8:16] = True
    assert torch.equal(kernels.post(*args).isnan(), spoilt)
    dz, y, dh, dc, dweight, dbias, dskip = post_backward(kernels, args, dy)
    for x in (dz, y, dh):
        assert torch.equal(x.isnan().flatten(2), spoilt)
    assert torch.equal(dweight.isnan(), spoilt[0, 4])
    assert not any(x.isnan().any() for x in (dc, dbias, dskip))


@pytest.mark.parametrize(('kernel', 'recompute'), [((3, 3), True), ((4,), False)])
def test_whole_layer(kernel, recompute):
    """Two directions, one of them by columns, through the public operation."""
    inputs = layer_inputs(35, D=8, kernel=kernel)
    expected = run(lambda *xs: on_grid(*xs, backend='reference'), inputs)
    options = dict(recompute=recompute, backend='triton')
    actual = run(lambda *xs: on_grid(*xs, **options), [x.float() for x in inputs])
    assert_close(actual, expected, 2e-5)
