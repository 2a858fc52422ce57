"""Other implementations of our ops: GPU packages where they are installed, the official models'
operations, and torch.compile.

A peer takes its inputs in the layout that it is made for, `prepare`d outside the measured time,
and its result is `restore`d outside it too. Inputs of one direction of a scan or convolution are
{(name, direction): tensor}, those of both {(name, None): tensor}.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[object, Tensor | int]  # integers, too, as tensors
Call = Callable[[], Tensor | tuple[Tensor, ...]]


def differentiable(x: Tensor | int) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def grid(length: int) -> tuple[int, int]:
    """Rows and columns of so many tokens, as near to a square as they go."""
    rows = next(n for n in range(int(length**0.5), 0, -1) if length % n == 0)
    return rows, length // rows


def one_direction(p: Inputs, direction: int) -> dict[str, Tensor]:
    return {name: x for (name, own), x in p.items() if own == direction}


# ------------------------------------------------- mamba-ssm and causal-conv1d, channels first


def channels_first(p: Inputs) -> Inputs:
    """(B, L, ·) as (B, ·, L), weights as they are."""
    return {name: x.mT if x.dim() == 3 else x for name, x in p.items()}


def split_directions(p: Inputs) -> Inputs:
    """Stacked directions as tensors of their own, channels first.

    The official Vim makes u, dt, B and C of its backward direction from flipped tokens, so they
    come flipped; z does not.
    """
    result = {}
    for name, x in p.items():
        if name == 'z':
            result[name, None] = x.mT
        elif x.dim() == 4:
            result[name, 0], result[name, 1] = x[0].mT, x[1].mT.flip(-1)
        else:
            result[name, 0], result[name, 1] = x[0], x[1]
    return result


def _mamba_ssm(p: dict[str, Tensor], z: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    sequences = (p[name] for name in ('u', 'dt', 'A', 'B', 'C', 'D'))
    return selective_scan_fn(*sequences, z=z, delta_bias=p['dt_bias'], delta_softplus=True)


def mamba_scan(p: Inputs) -> Call:
    """mamba-ssm's selective_scan_fn."""
    return lambda: _mamba_ssm(p, p['z'])


def mamba_scan_twice(p: Inputs) -> Call:
    """As the official Vim: the gate in both calls, z and the second result flipped."""
    first, second, z = one_direction(p, 0), one_direction(p, 1), p['z', None]

    def call():
        backward = _mamba_ssm(second, z.flip(-1))
        return _mamba_ssm(first, z) / 2 + backward.flip(-1) / 2

    return call


def conv_input(p: Inputs) -> Inputs:
    """Tokens channels first; the weights (2, D, 4) and (2, D) for each direction."""
    weights = {(name, i): p[name][i] for name in ('weight', 'bias') for i in (0, 1)}
    return {'x': p['x'].mT, **weights}


def causal_conv_twice(p: Inputs) -> Call:
    """causal-conv1d on the tokens and on the flipped tokens, which stay flipped."""
    from causal_conv1d import causal_conv1d_fn

    def call():
        x = p['x']
        return tuple(
            causal_conv1d_fn(y, p['weight', i], p['bias', i], activation='silu')
            for i, y in enumerate((x, x.flip(-1)))
        )

    return call


def stack_flipped(forward: Tensor, backward: Tensor) -> Tensor:
    return torch.stack([forward.mT, backward.flip(-1).mT])


# ---------------------------------------------------------- the official Vim's whole mixer


def _project(x, conv_weight, conv_bias, x_proj, dt_proj):
    """(B, E, L) to u, dt (B, E, L) and B, C (B, N, L), by the official code's operations."""
    from causal_conv1d import causal_conv1d_fn

    batch, _, length = x.shape
    rank = dt_proj.shape[1]
    u = causal_conv1d_fn(x, conv_weight, conv_bias, activation='silu')
    low = F.linear(u.transpose(1, 2).reshape(batch * length, -1), x_proj)
    dt = (dt_proj @ low[:, :rank].t()).unflatten(1, (batch, length)).transpose(0, 1)
    B, C = low[:, rank:].unflatten(0, (batch, length)).transpose(1, 2).chunk(2, dim=1)
    return u, dt, B.contiguous(), C.contiguous()


class RecomputingInner(torch.autograd.Function):
    """One direction, (B, 2E, L) to the gated (B, E, L).

    Keeps what the official mamba_inner_fn_no_out_proj keeps: u and dt are computed again in the
    backward pass, and the gradients of x and z are written side by side. Unlike it, this does not
    ask for the output once more, and drops it.
    """

    @staticmethod
    def forward(ctx, xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias):
        import selective_scan_cuda

        x, z = xz.chunk(2, dim=1)
        u, dt, B, C = _project(x, conv_weight, conv_bias, x_proj, dt_proj)
        B, C = B.unsqueeze(1), C.unsqueeze(1)
        out, states, gated = selective_scan_cuda.fwd(u, dt, A, B, C, D, z, dt_bias, True)
        ctx.save_for_backward(
            xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, out, states
        )
        return gated

    @staticmethod
    def backward(ctx, dout):
        import selective_scan_cuda

        xz, *weights, A, D, dt_bias, out, states = ctx.saved_tensors
        x, z = xz.chunk(2, dim=1)
        dxz = torch.empty_like(xz)
        dx, dz = dxz.chunk(2, dim=1)
        leaves = [t.detach().requires_grad_() for t in (x, *weights)]
        with torch.enable_grad():
            projected = _project(*leaves)
        u, dt, B, C = (t.detach() for t in projected)
        du, ddt, dA, dB, dC, dD, dbias, *_ = selective_scan_cuda.bwd(
            *(u, dt, A, B.unsqueeze(1), C.unsqueeze(1), D, z, dt_bias),
            *(dout.contiguous(), states, out, dz, True, False),
        )
        grads = [du, ddt, dB.squeeze(1).to(B.dtype), dC.squeeze(1).to(C.dtype)]
        grad_x, *grad_weights = torch.autograd.grad(projected, leaves, grads)
        dx.copy_(grad_x)
        return dxz, *grad_weights, dA, dD, dbias


def vim_mixer(p: Inputs) -> Call:
    """The official mixer; inputs are the tokens and our VimMixer's parameters."""

    def direction(xz, suffix):
        return RecomputingInner.apply(
            xz,
            p[f'conv1d{suffix}.weight'].squeeze(1),
            p[f'conv1d{suffix}.bias'],
            p[f'x_proj{suffix}.weight'],
            p[f'dt_proj{suffix}.weight'],
            -torch.exp(p[f'A{suffix}_log'].float()),
            p[f'D{suffix}'],
            p[f'dt_proj{suffix}.bias'],
        )

    def call():
        batch, length, _ = p['tokens'].shape
        xz = p['in_proj.weight'] @ p['tokens'].flatten(0, 1).t()
        xz = xz.unflatten(1, (batch, length)).transpose(0, 1)
        y = direction(xz, '') / 2 + direction(xz.flip(-1), '_b').flip(-1) / 2
        return F.linear(y.transpose(1, 2), p['out_proj.weight'])

    return call


# ------------------------------------------------- mLSTM: mlstm-kernels, fla, and S × S matrices


def heads_first(p: Inputs) -> Inputs:
    """(B, S, H, ·) as (B, H, S, ·), and the gates alike."""
    return {name: x.transpose(1, 2) if differentiable(x) else x for name, x in p.items()}


def tokens_first(h: Tensor) -> Tensor:
    return h.transpose(1, 2)


def xl_chunk(p: Inputs) -> Call:
    """mlstm-kernels' kernels for long chunks: our result, but their backward, as its plain twin in
    that package (`native_custbw`), takes the normaliser for a constant.
    """
    from mlstm_kernels.torch import get_mlstm_kernel

    kernel = get_mlstm_kernel('chunkwise--triton_xl_chunk')
    return lambda: kernel(**p, autocast_kernel_dtype=p['q'].dtype)


def no_input_gate(p: Inputs) -> Inputs:
    return {name: x for name, x in p.items() if name != 'i'}


def simple_gla(p: Inputs) -> Call:
    """fla's linear attention with a decay for each token and head."""
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda: chunk_simple_gla(p['q'], p['k'], p['v'], g=F.logsigmoid(p['f'].float()))[0]


def quadratic_mlstm(q, k, v, i, f, eps: float = 1e-6) -> Tensor:
    """The equations of `visionseq_mm.ops.mlstm` as they stand, heads first: (B, H, S, Dh).

    As the official cell, which has no other form: several S × S matrices for each head.
    """
    length = q.shape[2]
    sums = F.logsigmoid(f.float()).cumsum(-1)
    D = sums.unsqueeze(-1) - sums.unsqueeze(-2) + i.float().unsqueeze(-2)
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    D = D.masked_fill(~past, -torch.inf)
    m = D.amax(-1, keepdim=True)
    C = (q @ k.mT) * q.shape[-1] ** -0.5 * (D - m).exp()
    n = torch.maximum(C.sum(-1, keepdim=True).abs(), (-m).exp())
    return (C / (n + eps)).to(v.dtype) @ v


def quadratic(p: Inputs) -> Call:
    return lambda: quadratic_mlstm(**p)


# ------------------------------------------------ ViL's whole layer, and what is around its cell


def same_dtype(p: Inputs) -> Inputs:
    """All in the dtype of the first, as a model cast as a whole has it."""
    dtype = next(iter(p.values())).dtype
    return {name: x.to(dtype) for name, x in p.items()}


def vil_pre(x, conv_weight, conv_bias, qkv, qkv_bias, gates, gates_bias) -> tuple[Tensor, ...]:
    """By the official operations, channels first for the convolution only; (B, L, ·) each."""
    image = x.transpose(1, 2).unflatten(2, grid(x.shape[1]))
    c = F.conv2d(image, conv_weight.unsqueeze(1), conv_bias, padding=1, groups=x.shape[2])
    c = F.silu(c.flatten(2).transpose(1, 2))
    q, k, v = (
        torch.einsum('blgd,god->blgo', of.unflatten(2, (-1, 4)), weight).flatten(2) + bias
        for of, weight, bias in zip((c, c, x), qkv, qkv_bias, strict=True)
    )
    together = torch.cat([q, k, v], -1)
    i, f = (
        F.linear(together, *pair) for pair in zip(gates.chunk(2), gates_bias.chunk(2), strict=True)
    )
    return c, q, k, v, i, f


def vil_post(h, c, z, norm_weight, norm_bias, skip) -> Tensor:
    """The norm of each head as a group norm of h (B, L, H, Dh), skip and gate."""
    flat = h.flatten(0, 1).flatten(1)
    normed = F.group_norm(flat, h.shape[2], norm_weight, norm_bias, eps=1e-5).view_as(c)
    return (normed + skip * c) * F.silu(z)


def by_name(function: Callable) -> Callable[[Inputs], Call]:
    return lambda p: lambda: function(**p)


def vil_mixer(p: Inputs) -> Call:
    """A layer of version 2; inputs are the tokens and our ViLLayer's parameters."""

    def gates(of):
        return torch.cat([p[f'mlstm_cell.{name}.{of}'] for name in ('igate', 'fgate')])

    def call():
        x, z = F.linear(p['tokens'], p['proj_up.weight'], p['proj_up.bias']).chunk(2, -1)
        projections = ('q_proj', 'k_proj', 'v_proj')
        c, *qkv, i, f = vil_pre(
            x,
            p['conv.weight'].squeeze(1),
            p['conv.bias'],
            [p[f'{name}.weight'] for name in projections],
            [p[f'{name}.bias'] for name in projections],
            gates('weight'),
            gates('bias'),
        )
        heads = i.shape[2]
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv)
        h = quadratic_mlstm(q, k, v, i.transpose(1, 2), f.transpose(1, 2)).transpose(1, 2)
        norm = 1 + p['mlstm_cell.outnorm.weight'], p['mlstm_cell.outnorm.bias']
        y = vil_post(h, c, z, *norm, p['learnable_skip'])
        return F.linear(y, p['proj_down.weight'], p['proj_down.bias'])

    return call


# ------------------------------- SecViT: tokens sorted and gathered, heads first, (B, H, L, ·)


def cosines(k: Tensor) -> Tensor:
    """Of each key with the mean key, (B, H, L); in float32, as ours, for the same clusters."""
    k = k.detach().float()
    return F.cosine_similarity(k, k.mean(2, keepdim=True), dim=-1)


def only_cosines(p: Inputs) -> Inputs:
    return dict(cosines=cosines(p['k'].transpose(1, 2)))


def two_argsorts(cosines: Tensor) -> tuple[Tensor, Tensor]:
    order = cosines.argsort(-1)
    return order, order.argsort(-1)


def official_partition(k: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    return two_argsorts(cosines(k))


def only_order(order: Tensor, inverse: Tensor) -> Tensor:
    return order


def sortable(p: Inputs) -> Inputs:
    """Heads first, and an order as torch indexes."""
    p = heads_first(p)
    return p | dict(idx=p['idx'].long()) if 'idx' in p else p


def official_attention(q, k, v, num_clusters: int, lepe=0, idx=None) -> Tensor:
    """As published: q, k and v gathered by an index that is expanded to all channels, matrices of
    tokens by tokens, and back by the argsort of the order. One cluster has no order.

    Sorts the tokens by their `cosines` where it is not given an order.
    """
    if idx is None and num_clusters > 1:
        idx = cosines(k).argsort(-1)  # before k is rounded once more
    k = k * q.shape[-1] ** -0.5
    if num_clusters == 1:
        return (q @ k.mT).softmax(-1) @ v + lepe
    q, k, v = (_take(x, idx).unflatten(2, (num_clusters, -1)) for x in (q, k, v))
    out = (q @ k.mT).softmax(-1) @ v
    return _take(out.flatten(2, 3), idx.argsort(-1)) + lepe


def _take(x, order):
    return x.gather(2, order.unsqueeze(-1).expand_as(x))


class Permute(torch.autograd.Function):
    """Rows of x in an order, or back in their places; its gradient is the other one."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order)
        ctx.back = back
        return torch.empty_like(x).index_copy_(0, order, x) if back else x.index_select(0, order)

    @staticmethod
    def backward(ctx, dout):
        return Permute.apply(dout.contiguous(), *ctx.saved_tensors, not ctx.back), None, None


def gathered_attention(q, k, v, num_clusters: int, lepe=0, idx=None) -> Tensor:
    """The quick way in plain PyTorch: whole rows gathered, fused attention of all clusters, and
    rows put back where they were. One cluster takes neither.
    """
    B, H, L, Dh = q.shape
    if num_clusters == 1:
        return F.scaled_dot_product_attention(q, k, v) + lepe
    if idx is None:
        idx = cosines(k).sort(dim=-1, stable=True).indices
    rows = (idx.flatten(0, 1) + L * torch.arange(B * H, device=q.device)[:, None]).flatten()
    clusters = B * H, num_clusters, -1, Dh
    gathered = (Permute.apply(x.reshape(-1, Dh), rows, False).view(clusters) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*gathered).reshape(-1, Dh)
    return Permute.apply(out, rows, True).view(B, H, L, Dh) + lepe


def grid_of_heads(p: Inputs) -> Inputs:
    """(B, h, w, H, Dh) as (B, H, h, w, Dh)."""
    return {name: x.movedim(3, 1) for name, x in p.items()}


def stack_grids(q: Tensor, k: Tensor) -> Tensor:
    return torch.stack([q, k]).movedim(2, 4)


def rotary(p: Inputs) -> Call:
    """By the official operations; sines and cosines are made once for a stage."""
    *_, h, w, Dh = p['q'].shape
    theta = (10000 ** -torch.linspace(0, 1, Dh // 4)).repeat_interleave(2)
    rows, columns = (torch.arange(n)[:, None] * theta for n in (h, w))
    angles = torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], -1)
    sin, cos = angles.sin().to(p['q']), angles.cos().to(p['q'])

    def turn(x):
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + other * sin

    return lambda: (turn(p['q']), turn(p['k']))


def channels_first_map(p: Inputs) -> Inputs:
    """(B, h, w, C) as a contiguous (B, C, h, w)."""
    return p | dict(x=p['x'].permute(0, 3, 1, 2))


def channels_last_map(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def plain_depthwise(x, weight, bias, residual=False) -> Tensor:
    """torch's, of (B, C, h, w) in any order in memory."""
    out = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
    return out + x if residual else out


def depthwise_of_tokens(x, weight, bias, residual=False) -> Tensor:
    """torch's, of (B, h, w, C) as a map that is channels-last in memory."""
    return plain_depthwise(x.permute(0, 3, 1, 2), weight, bias, residual).permute(0, 2, 3, 1)


# ----------------------------------------------------------------- torch.compile


def compiled(function: Callable[..., Tensor]) -> Callable[[Inputs], Call]:
    """`function` of the inputs by name, compiled for one shape."""

    def build(p):
        torch._dynamo.reset()  # beyond a few shapes it would silently stop compiling
        fast = torch.compile(function, dynamic=False, fullgraph=True)
        return lambda: fast(**p)

    return build


def recur(a: Tensor, b: Tensor, group: int = 8) -> Tensor:
    """h_t = a_t h_{t−1} + b_t along dim 1: groups of steps side by side, then their ends alike."""
    length = a.shape[1]
    if length == 1:
        return b
    pad = (0, 0) * (a.dim() - 2) + (0, -length % group)
    a = F.pad(a, pad, value=1.0).unflatten(1, (-1, group))
    b = F.pad(b, pad).unflatten(1, (-1, group))
    product, state = a[:, :, 0], b[:, :, 0]
    products, states = [product], [state]
    for t in range(1, group):
        product = product * a[:, :, t]
        state = a[:, :, t] * state + b[:, :, t]
        products.append(product)
        states.append(state)
    before = F.pad(recur(product, state)[:, :-1], (0, 0) * (a.dim() - 3) + (1, 0))
    h = torch.stack(states, 2) + torch.stack(products, 2) * before.unsqueeze(2)
    return h.flatten(1, 2)[:, :length]


def plain_scan(u, dt, A, B, C, D, z, dt_bias) -> Tensor:
    """The selective scan as a formula, every state in memory."""
    delta = F.softplus(dt.float() + dt_bias)
    a = torch.exp(delta.unsqueeze(-1) * A)
    h = recur(a, (delta * u).unsqueeze(-1) * B.float().unsqueeze(-2))
    y = (h * C.float().unsqueeze(-2)).sum(-1) + D * u
    return y.to(u.dtype) if z is None else (y * F.silu(z.float())).to(u.dtype)


def plain_bidirectional(u, dt, A, B, C, D, z, dt_bias) -> Tensor:
    forward = plain_scan(u[0], dt[0], A[0], B[0], C[0], D[0], None, dt_bias[0])
    u_, dt_, B_, C_ = (x[1].flip(1) for x in (u, dt, B, C))
    backward = plain_scan(u_, dt_, A[1], B_, C_, D[1], None, dt_bias[1]).flip(1)
    return ((forward.float() + backward) / 2 * F.silu(z.float())).to(u.dtype)


def plain_conv(x, weight, bias) -> Tensor:
    """Shifted sums, in the input's order of tokens for both directions."""
    length, taps = x.shape[1], weight.shape[-1]
    outs = []
    for direction in (0, 1):
        pad = (0, taps - 1) if direction else (taps - 1, 0)
        padded = F.pad(x.float(), (0, 0, *pad))
        w = weight[direction].flip(-1) if direction else weight[direction]
        y = sum(padded[:, k : k + length] * w[:, k] for k in range(taps))
        outs.append(F.silu(y + bias[direction]).to(x.dtype))
    return torch.stack(outs)


def plain_mlstm(q, k, v, i, f, chunk: int = 64, eps: float = 1e-6) -> Tensor:
    """The mLSTM in chunks, all side by side, and the state before each from those of all.

    The stabilisers cancel but for `eps`, so that they are taken as constants.
    """
    length, dtype = q.shape[1], q.dtype

    def in_chunks(x, value=0.0):
        """(B, S, H, ·) as (B, H, chunks, T, ·) in float32."""
        pad = (0, 0) * (x.dim() - 2) + (0, -length % chunk)
        return F.pad(x.float(), pad, value=value).unflatten(1, (-1, chunk)).movedim(3, 1)

    q, k, v = (in_chunks(x) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    v1 = F.pad(v, (0, 1), value=1.0)
    sums = F.logsigmoid(in_chunks(f, 100.0)).flatten(2).cumsum(-1)
    a = in_chunks(i, -torch.inf).flatten(2) - sums
    g = a.detach().cummax(-1).values
    bound = torch.exp(-sums - g).unflatten(2, (-1, chunk))
    a, g = (x.unflatten(2, (-1, chunk)) for x in (a, g))

    past = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    weight = (a.unsqueeze(-2) - g.unsqueeze(-1)).masked_fill(~past, -torch.inf).exp()
    num = ((q @ k.mT) * weight) @ v1

    # What chunk d adds to the state before chunk c, weighed by the maximum in it of all before c.
    last = g[..., -1]
    own = (k * (a - last.unsqueeze(-1)).exp().unsqueeze(-1)).mT @ v1
    before = F.pad(last[..., :-1], (1, 0))
    earlier = torch.ones_like(past[:1, :1]).expand(2 * (last.shape[-1],)).tril(-1)
    share = (last.unsqueeze(-2) - before.unsqueeze(-1)).masked_fill(~earlier, -torch.inf).exp()
    state = (share @ own.flatten(-2)).unflatten(-1, own.shape[-2:])
    # Before the first chunk there is none, and nothing to weigh.
    num = num + (q * (before.unsqueeze(-1) - g).clamp(max=0).exp().unsqueeze(-1)) @ state

    n = torch.maximum(num[..., -1].abs(), bound) + eps
    h = (num[..., :-1] / n.unsqueeze(-1)).movedim(1, 3).flatten(1, 2)
    return h[:, :length].to(dtype)
