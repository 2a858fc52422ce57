"""Naive twins of the ops, each written from its equation, and what the op tests share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionseq_mm.ops import (
    bidirectional_scan,
    cluster_attention,
    conv1d_silu,
    mlstm,
    rotary_2d,
    sec_attention,
    sec_partition,
    selective_scan,
    vil_mixer,
    vim_mixer,
)
from visionseq_mm.ops.cluster_attention import reference as cluster_reference
from visionseq_mm.ops.dispatch import INSTALLED
from visionseq_mm.ops.mlstm import reference as mlstm_reference
from visionseq_mm.ops.rotary_2d import frequencies
from visionseq_mm.ops.selective_scan import reference as scan_reference
from visionseq_mm.ops.vil_mixer import Weights

SIZES = (1, 7, 63, 64, 65, 200)


def flipped(fn, inputs):
    """flip(fn(flip(inputs))) along the tokens of three- and four-dimensional inputs."""
    return fn(*(x.flip(1) if x is not None and x.dim() > 2 else x for x in inputs)).flip(1)


def scan_twin(u, dt, A, B, C, D=None, z=None, dt_bias=None):
    """One step after the other."""
    delta = dt if dt_bias is None else dt + dt_bias
    delta = torch.where(delta > 20, delta, delta.clamp(max=20).exp().log1p())
    h = u.new_zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[1]):
        d = delta[:, t, :, None]
        h = torch.exp(d * A) * h + d * u[:, t, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D * u
    return y if z is None else y * z * torch.sigmoid(z)


def both_twin(u, dt, A, B, C, D=None, z=None, dt_bias=None):
    """Each direction for itself, the second of flipped tokens, and half their sum gated."""

    def one(s, flip):
        inputs = [None if x is None else x[s] for x in (u, dt, A, B, C, D)]
        inputs += [None, None if dt_bias is None else dt_bias[s]]
        return flipped(scan_twin, inputs) if flip else scan_twin(*inputs)

    y = (one(0, flip=False) + one(1, flip=True)) / 2
    return y if z is None else y * z * torch.sigmoid(z)


def conv_twin(x, weight, bias, reverse=(False, True)):
    """Token by token over its predecessors; a reversed direction of flipped tokens."""

    def one(x, weight, bias):
        W = weight.shape[1]
        out = []
        for t in range(x.shape[1]):
            total = bias.expand(x.shape[0], -1)
            for k in range(W):
                if t - W + 1 + k >= 0:
                    total = total + weight[:, k] * x[:, t - W + 1 + k]
            out.append(total * torch.sigmoid(total))
        return torch.stack(out, 1)

    return torch.stack(
        [
            one(x.flip(1), w, b).flip(1) if backwards else one(x, w, b)
            for w, b, backwards in zip(weight, bias, reverse, strict=True)
        ]
    )


def mixer_twin(
    tokens,
    in_proj,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    dt_bias,
    A,
    D,
    out_proj,
    reverse=(False, True),
    conv_reverse=None,
):
    """One part after the other, in the order of the equations."""
    x, z = (tokens @ in_proj.mT).chunk(2, -1)
    u = conv_twin(x, conv_weight, conv_bias, conv_reverse or reverse)
    R, N, ys = dt_proj.shape[2], A.shape[2], []
    for s, backwards in enumerate(reverse):
        low, B, C = (u[s] @ x_proj[s].mT).split([R, N, N], -1)
        inputs = [u[s], low @ dt_proj[s].mT, A[s], B, C, D[s], None, dt_bias[s]]
        ys.append(flipped(scan_twin, inputs) if backwards else scan_twin(*inputs))
    return (sum(ys) / len(ys) * z * torch.sigmoid(z)) @ out_proj.mT


def mlstm_twin(q, k, v, i, f, eps=1e-6):
    """The quadratic parallel form."""
    q, k, v, i, f = (x.transpose(1, 2) for x in (q, k, v, i, f))
    S, Dh = q.shape[-2:]
    sums = F.logsigmoid(f).cumsum(-1)
    D = sums[..., :, None] - sums[..., None, :] + i[..., None, :]
    D = D.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf)
    m = D.amax(-1, keepdim=True)
    C = (q @ k.mT) / Dh**0.5 * (D - m).exp()
    n = torch.maximum(C.sum(-1, keepdim=True).abs(), (-m).exp())
    return ((C @ v) / (n + eps)).transpose(1, 2)


def layer_twin(
    tokens,
    proj_up,
    proj_up_bias,
    conv_weight,
    conv_bias,
    qkv,
    qkv_bias,
    gates,
    gates_bias,
    norm_weight,
    norm_bias,
    skip,
    proj_down,
    proj_down_bias,
    reverse=(True, False),
    columns=(False, True),
):
    """One part after the other, in the order of the equations; other directions by moving tokens.

    Tokens are those of `token_grid`.
    """
    grid = token_grid(tokens.shape[1])

    def one(s, x, z, grid):
        L, H = x.shape[1], gates_bias.shape[1] // 2
        if conv_weight.dim() == 3:
            taps = range(conv_weight.shape[2])
            padded = F.pad(x, (0, 0, len(taps) - 1, 0))
            c = sum(padded[:, n : n + L] * conv_weight[s, :, n] for n in taps)
        else:
            taps = range(conv_weight.shape[2])
            padded = F.pad(x.unflatten(1, grid), (0, 0, *[len(taps) // 2] * 4))
            c = sum(
                padded[:, n : n + grid[0], m : m + grid[1]] * conv_weight[s, :, n, m]
                for n in taps
                for m in taps
            ).flatten(1, 2)
        c = F.silu(c + conv_bias[s])
        parts = [
            (torch.block_diag(*weight) @ of.mT).mT + bias
            for of, weight, bias in zip((c, c, x), qkv[s], qkv_bias[s], strict=True)
        ]
        i, f = (torch.cat(parts, -1) @ gates[s].mT + gates_bias[s]).chunk(2, -1)
        h = mlstm_twin(*(part.unflatten(2, (H, -1)) for part in parts), i, f)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-5).flatten(2)
        return (h * norm_weight[s] + norm_bias[s] + skip[s] * c) * F.silu(z)

    x, z = (tokens @ proj_up.mT + proj_up_bias).chunk(2, -1)
    total = torch.zeros_like(x)
    for s, (backwards, turned) in enumerate(zip(reverse, columns, strict=True)):
        order = torch.arange(x.shape[1]).view(grid)
        order = (order.T if turned else order).flatten()
        order = order.flip(0) if backwards else order
        y = one(s, x[:, order], z[:, order], grid[::-1] if turned else grid)
        total = total + y[:, order.argsort()]
    return total @ proj_down.mT + proj_down_bias


def partition_twin(k, num_clusters, valid=None):
    """Cluster by cluster lists of tokens for each sample and head, and the order they make."""
    B, L, H, _ = k.shape
    clusters, order = {}, torch.empty(B, H, L, dtype=torch.int32)
    for b in range(B):
        here = [t for t in range(L) if valid is None or valid[b, t]]
        away = [t for t in range(L) if t not in here]
        for h in range(H):
            mean = k[b, here, h].mean(0) if here else None
            cosine = {t: float(F.cosine_similarity(k[b, t, h], mean, dim=0)) for t in here}
            tokens = sorted(here, key=lambda t: (cosine[t], t))
            order[b, h] = torch.tensor(tokens + away)
            n = len(tokens)
            for c in range(num_clusters):
                clusters[b, h, c] = tokens[c * n // num_clusters : (c + 1) * n // num_clusters]
    return clusters, order


def cluster_twin(q, k, v, num_clusters, valid=None, lepe=None):
    """One softmax for each cluster."""
    out = torch.zeros_like(v)
    for (b, h, _), tokens in partition_twin(k.detach(), num_clusters, valid)[0].items():
        if tokens:
            P = torch.softmax(q[b, tokens, h] @ k[b, tokens, h].T / q.shape[-1] ** 0.5, -1)
            at = torch.zeros_like(v)
            at[b, tokens, h] = P @ v[b, tokens, h]
            if lepe is not None:
                at[b, tokens, h] += lepe[b, tokens, h]
            out = out + at
    return out


def rotary_twin(q, k):
    """Pairs of channels as complex numbers, on `token_grid`."""
    h, w = token_grid(q.shape[1])
    theta = frequencies(q.shape[-1], q.device, q.dtype)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    angles = torch.cat([y.reshape(-1, 1) * theta, x.reshape(-1, 1) * theta], -1)[:, None]
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = [torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) for z in (q, k)]
    return torch.stack([torch.view_as_real(z * turn).flatten(-2) for z in pairs], 1)


def scan_inputs(L, D=5, N=3):
    shapes = [(2, L, D), (2, L, D), (D, N), (2, L, N), (2, L, N), (D,), (2, L, D), (D,)]
    u, dt, A, *rest = normal(*shapes)
    return [u, dt, -A.abs(), *rest]


def both_inputs(L, D=5, N=3):
    shapes = [(2, 2, L, D), (2, 2, L, D), (2, D, N), (2, 2, L, N), (2, 2, L, N)]
    u, dt, A, *rest = normal(*shapes, (2, D), (2, L, D), (2, D))
    return [u, dt, -A.abs(), *rest]


def conv_inputs(L, D=5, W=4):
    return normal((2, L, D), (2, D, W), (2, D))


def mixer_inputs(L, D=6, S=2, N=3, R=2, W=4):
    E = 2 * D
    shapes = [(2, L, D), (2 * E, D), (S, E, W), (S, E), (S, R + 2 * N, E), (S, E, R), (S, E)]
    *weights, A, skip, out_proj = normal(*shapes, (S, E, N), (S, E), (D, E))
    # Step sizes of half, and outputs of the size of inputs.
    weights[1], weights[4] = weights[1] / D**0.5, weights[4] / E**0.5
    return [*weights, -A.abs(), skip, out_proj / E**0.5]


def mlstm_inputs(S, Dh=6, H=3):
    q, k, v, i, f = normal(*[(2, S, H, Dh)] * 3, *[(2, S, H)] * 2)
    # Input gates on both sides of the bound exp(−m), forget gates as at the start of training.
    return [q, k, v, i - 1, f + 3]


def token_grid(L):
    """Rows and columns of L tokens, as near to a square as they go."""
    rows = max([n for n in range(1, int(L**0.5) + 1) if L % n == 0] or [1])
    return rows, L // rows


def layer_inputs(L, D=6, H=2, S=2, kernel=(3, 3), E=None):
    E = E or 2 * D
    shapes = [(2, L, D), (2 * E, D), (2 * E,), (S, E, *kernel), (S, E), (S, 3, E // 4, 4, 4)]
    shapes += [(S, 3, E), (S, 2 * H, 3 * E), (S, 2 * H), *[(S, E)] * 3, (D, E), (D,)]
    inputs = normal(*shapes)
    inputs[1] = inputs[1] / D**0.5
    # The norm makes noise of h where it is small: no sums that cancel, and values of some size.
    inputs[3] = inputs[3] / inputs[3][0, 0].numel()
    inputs[5][:, :2] = inputs[5][:, :2] / 4
    inputs[6] = inputs[6] / 4 + 1
    inputs[6][:, 2, ::2] -= 3
    inputs[7] = inputs[7] / E
    inputs[8] = inputs[8] + torch.tensor([0.0, 2.0]).repeat_interleave(H)
    return inputs


def on_grid(tokens, *weights, reverse=(True, False), columns=(False, True), **kwargs):
    """`vil_mixer` on the `token_grid` of flat arguments."""
    grid = token_grid(tokens.shape[1])
    return vil_mixer(tokens, Weights(*weights), grid, reverse, columns, **kwargs)


def cluster_inputs(L, Dh=6, H=3):
    return normal(*[(2, L, H, Dh)] * 4)


def clustered(q, k, v, lepe, **kwargs):
    """`cluster_attention` of tensors alone."""
    return cluster_attention(q, k, v, clusters_of(q), lepe=lepe, **kwargs)


def rotary_inputs(L, Dh=8, H=3):
    return normal(*[(2, L, H, Dh)] * 2)


def turned(q, k, **kwargs):
    """`rotary_2d` on `token_grid`, both results in one."""
    grid = token_grid(q.shape[1])
    both = rotary_2d(q.unflatten(1, grid), k.unflatten(1, grid), **kwargs)
    return torch.stack([x.flatten(1, 2) for x in both], 1)


def normal(*shapes):
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@dataclass
class Case:
    """An op as a function of tensors alone, its twin, and ways into its implementation."""

    name: str
    op: Callable
    twin: Callable
    inputs: Callable[[int], list[Tensor]]
    schema: Callable[[list[Tensor]], tuple]  # arguments of torch.ops.visionseq_mm.<registered>
    steps: Callable[[list[Tensor]], None] | None = None  # the reference, forward and backward
    wide: tuple[int, ...] = ()  # inputs that may be float32 beside bfloat16
    half: float = 2e-2  # error in bfloat16
    registered: str = ''
    registered_backward: str = ''
    backend: str = 'reference'

    def __post_init__(self):
        self.registered = self.registered or self.name
        self.registered_backward = self.registered_backward or f'{self.registered}_backward'

    def __str__(self):
        return f'{self.name}-{self.backend}'

    def on(self, backend):
        """The same case of another implementation."""
        schema = self.schema
        return replace(
            self,
            op=partial(self.op, backend=backend),
            schema=lambda xs: (*schema(xs)[:-1], backend),
            backend=backend,
        )


def clusters_of(x: Tensor) -> int:
    return min(3, x.shape[1])


def one_direction(inputs):
    """The arguments of one scan as those of the registered op, directions first."""
    *inputs, z, dt_bias = inputs
    return *(x[None] for x in inputs), z, dt_bias[None]


def _scan_steps(inputs):
    inputs = one_direction(inputs)
    out, states = scan_reference.forward(*inputs, [False])
    scan_reference.backward(torch.ones_like(out), *inputs, states, [False])


def _mlstm_steps(inputs):
    h, sums = mlstm_reference.forward(*inputs, False, 1e-6)
    mlstm_reference.backward(torch.ones_like(h), *inputs, h, sums, False, 1e-6)


def _cluster_steps(inputs, num_clusters=32):
    *inputs, lepe = inputs
    idx = cluster_reference.partition(inputs[1], num_clusters, None)
    out, *kept = cluster_reference.forward(*inputs, idx, num_clusters, None, lepe, True)
    cluster_reference.backward(torch.ones_like(out), *inputs, idx, *kept, num_clusters, None)


SCAN = Case(
    'selective_scan',
    selective_scan,
    scan_twin,
    scan_inputs,
    lambda xs: (*one_direction(xs), [False], 'reference'),
    _scan_steps,
    wide=(2, 5, 7),
)
BOTH = Case(
    'bidirectional_scan',
    bidirectional_scan,
    both_twin,
    both_inputs,
    lambda xs: (*xs, [False, True], 'reference'),
    wide=(2, 5, 7),
    registered='selective_scan',
)
CONV = Case(
    'conv1d_silu',
    conv1d_silu,
    conv_twin,
    conv_inputs,
    lambda xs: (*xs, [False, True], 'reference'),
    wide=(1, 2),
)
MIXER = Case(
    'vim_mixer',
    vim_mixer,
    mixer_twin,
    mixer_inputs,
    lambda xs: (*xs, [False, True], [False, True], 'states', 'reference'),
    wide=(6, 7, 8),
)
MLSTM = Case(
    'mlstm',
    mlstm,
    mlstm_twin,
    mlstm_inputs,
    lambda xs: (*xs, False, 1e-6, 'reference'),
    _mlstm_steps,
    wide=(3, 4),
)
LAYER = Case(
    'vil_mixer',
    on_grid,
    layer_twin,
    layer_inputs,
    lambda xs: (
        xs[0].unflatten(1, token_grid(xs[0].shape[1])),
        xs[1:],
        [True, False],
        [False, True],
        'cells',
        'reference',
    ),
    wide=(7, 8, 9, 10, 11),
    half=8e-2,  # of the gates, of which the norm leaves little to see
)
CLUSTER = Case(
    'sec_attention',
    clustered,
    lambda q, k, v, lepe: cluster_twin(q, k, v, clusters_of(q), lepe=lepe),
    cluster_inputs,
    lambda xs: (
        *xs[:3],
        sec_partition(xs[1], clusters_of(xs[1])),
        clusters_of(xs[1]),
        None,
        xs[3],
        True,
        'reference',
    ),
    _cluster_steps,
)
ROTARY = Case(
    'rotary_2d',
    turned,
    rotary_twin,
    rotary_inputs,
    lambda xs: (*(x.unflatten(1, token_grid(x.shape[1])) for x in xs), False, 'reference'),
    registered_backward='rotary_2d',
)
CASES = tuple(
    case.on(backend)
    for case in (SCAN, BOTH, CONV, MIXER, MLSTM, LAYER, CLUSTER, ROTARY)
    for backend in ('reference', 'cpu')
    if backend == 'reference' or INSTALLED['numba']
)


def fixed_order(case, inputs):
    """CLUSTER's op with the clusters of these keys, as a smooth function."""
    K = clusters_of(inputs[1])
    idx = sec_partition(inputs[1], K, backend=case.backend)
    return lambda q, k, v, lepe: sec_attention(q, k, v, idx, K, None, case.backend, lepe)


def run(fn, inputs, dout=None):
    """Output and gradients of all inputs; `dout` is fixed noise by default."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    dout = normal(out.shape)[0] if dout is None else dout
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def run_and_count(fn, inputs):
    """`run`, and the elements that are kept for the backward besides `inputs`."""
    sizes = []

    def keep(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = run(fn, inputs)
    return results, sum(sizes) - sum(x.numel() for x in inputs)


def assert_close(actual, expected, ratio):
    """RMS of each error against RMS of what is expected; NaN and inf never pass."""
    for n, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape, f'tensor {n}: {x.shape}, not {y.shape}'
        assert x.isfinite().all(), f'tensor {n} is not finite'
        error = (x.double() - y.double()).square().mean().sqrt()
        size = y.double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f'tensor {n}: error {error:.1e} of {size:.1e}'


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, storage)
        return out
