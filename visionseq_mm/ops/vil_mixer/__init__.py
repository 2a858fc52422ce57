"""The whole gated layer of Vision-LSTM as one operation, which keeps little for its backward.

B batch, L tokens of a grid, D embedding, E inner channels, H heads, S directions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs, widest_dtype
from visionseq_mm.ops.dispatch import Backends
from visionseq_mm.ops.linear import input_gradient, linear, weight_gradient
from visionseq_mm.ops.mlstm import mlstm_flops

BACKENDS = Backends('vil_mixer', __name__, 'triton', 'cpu', 'reference')
BLOCK = 4  # channels of a block of the projections to q, k and v
CELL_EPS, NORM_EPS = 1e-6, 1e-5


class Weights(NamedTuple):
    """The parameters of a layer; absent (None) biases are zero.

    Attributes:
        proj_up, proj_up_bias: (2 E, D) and (2 E).
        conv_weight: (S, E, W), taps from the (W − 1)-th token before to the token; or
            (S, E, K, K) with an odd K, centred on the grid.
        conv_bias: (S, E).
        qkv, qkv_bias: (S, 3, E / 4, 4, 4), [out, in] of each block, and (S, 3, E).
        gates, gates_bias: (S, 2 H, 3 E) and (S, 2 H), input gates before forget gates.
        norm_weight, norm_bias, skip: (S, E).
        proj_down, proj_down_bias: (D, E) and (D).
    """

    proj_up: Tensor
    proj_up_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    gates: Tensor
    gates_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    skip: Tensor
    proj_down: Tensor
    proj_down_bias: Tensor | None


BIASES = ('proj_up_bias', 'qkv_bias', 'norm_bias', 'proj_down_bias')  # that may be absent
#: Weights that may be float32 beside half precision, and are under autocast.
WIDE = ('gates', 'gates_bias', 'norm_weight', 'norm_bias', 'skip')


def vil_mixer(
    tokens: Tensor,
    weights: Weights,
    grid: tuple[int, int],
    reverse: Sequence[bool] = (False,),
    columns: Sequence[bool] | None = None,
    recompute: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Projections, convolution, mLSTM cells, norm and gate of a ViL layer (arXiv 2406.04303).

        x, z = split(tokens proj_upᵀ + proj_up_bias)
        c_s = SiLU(conv_s(x))       q_s, k_s = blocks_s(c_s)       v_s = blocks_s(x)
        i_s, f_s = split([q_s, k_s, v_s] gates_sᵀ + gates_bias_s)
        h_s = mlstm(q_s, k_s, v_s, i_s, f_s)
        y_s = norm(h_s) ⊙ norm_weight_s + norm_bias_s + skip_s ⊙ c_s
        out = (Σ_s y_s ⊙ SiLU(z)) proj_downᵀ + proj_down_bias

    for the directions s. `blocks` multiplies each 4 channels by a matrix of their own, `norm` is
    over the channels of a head (eps 1e-5). A reversed direction is flip(…(flip(x))), its
    convolution included; one of columns sees the transposed grid. Under autocast projections
    and convolution have its dtype.

    Args:
        tokens: (B, L, D), row after row of the grid.
        weights: See :class:`Weights`.
        grid: Rows and columns of the tokens.
        reverse: for each direction, whether it starts at the last token.
        columns: for each direction, whether it goes column after column; None: none does.
        recompute: keep only the tokens and the cells' output for the backward, which computes
            the rest again; False: keep x, z and all inputs of the cells too.
        backend: as that of :func:`visionseq_mm.ops.mlstm`.

    Returns:
        (B, L, D), in the dtype of the tokens or of autocast.

    Raises:
        ValueError: shapes that do not fit, an empty sequence, a dtype that is not floating
            point or differs (gates, norm and skip may be float32 beside half precision), inputs
            on several devices, an unknown or unsuitable backend.
    """
    weights = Weights(*weights)
    device = tokens.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tokens, *weights = (
            x.to(dtype) if x is not None and x.dtype == torch.float32 and name not in WIDE else x
            for name, x in zip(('tokens', *Weights._fields), (tokens, *weights), strict=True)
        )
        weights = Weights(*weights)
    _check(tokens, weights, grid, reverse, columns, recompute)
    columns = [False] * len(reverse) if columns is None else columns
    backend = BACKENDS.select(backend, tokens)
    keep = 'nothing'
    trains = any(x is not None and x.requires_grad for x in (tokens, *weights))
    # A trace of torch.jit would hold the choice for ever, and checks itself without gradients.
    if trains and torch.is_grad_enabled() and not torch.jit.is_tracing():
        keep = 'cells' if recompute else 'all'
    weights = list(_with_biases(weights))
    # The grid travels as a shape, which a trace keeps up with.
    tokens = tokens.unflatten(1, grid)
    out = _forward(tokens, weights, list(reverse), list(columns), keep, backend)[0]
    return out.flatten(1, 2)


def _check(tokens, w, grid, reverse, columns, recompute):
    op = 'vil_mixer'
    named = dict(tokens=tokens, **w._asdict())
    for name, x in named.items():
        if not isinstance(x, Tensor) and (x is not None or name not in BIASES):
            raise ValueError(f'{op}: {name} must be a tensor, got {x!r:.60}')
    on_grid = w.conv_weight.dim() == 4
    letters = dict(
        tokens='B L D',
        proj_down='D E',
        proj_down_bias='D',
        conv_weight='S E K K' if on_grid else 'S E W',
        conv_bias='S E',
        norm_weight='S E',
        norm_bias='S E',
        skip='S E',
        gates_bias='S 2H',
        gates='S 2H 3E',
        proj_up='2E D',
        proj_up_bias='2E',
        qkv='S 3 E/4 4 4',
        qkv_bias='S 3 E',
    )
    sizes = check_inputs(op, **{name: (named[name], dims) for name, dims in letters.items()})
    S, E, H = sizes['S'], sizes['E'], sizes['2H'] // 2
    if E % BLOCK or not H or E % H:
        raise ValueError(
            f'{op}: E must be a multiple of {BLOCK} and of H, got E = {E} and 2 H = {sizes["2H"]}'
        )
    derived = {'2E': 2 * E, '3E': 3 * E, 'E/4': E // 4, '2H': 2 * H, '3': 3, '4': 4}
    for name, dims in letters.items():
        expected = tuple(derived.get(letter, sizes[letter]) for letter in dims.split())
        if named[name] is not None and tuple(named[name].shape) != expected:
            raise ValueError(
                f'{op}: {name} must be ({dims.replace(" ", ", ")}) = {expected}, where E = {E} '
                f'and H = {H}; got shape {tuple(named[name].shape)}'
            )
    if on_grid and sizes['K'] % 2 == 0:
        raise ValueError(f'{op}: a kernel on the grid has an odd side, got {sizes["K"]}')
    if not isinstance(grid, tuple | list) or len(grid) != 2 or isinstance(grid[0], float):
        raise ValueError(f'{op}: grid must be two integers, rows and columns, got {grid!r}')
    if min(grid) < 1 or grid[0] * grid[1] != sizes['L']:
        raise ValueError(
            f'{op}: grid must be the rows and columns of {sizes["L"]} tokens, got {tuple(grid)}'
        )
    for name, flags in dict(reverse=reverse, columns=columns).items():
        if flags is None and name == 'columns':
            continue
        if not isinstance(flags, tuple | list) or len(flags) != S:
            raise ValueError(
                f'{op}: {name} must have an entry for each of {S} directions, got {flags!r}'
            )
    if not isinstance(recompute, bool):
        raise ValueError(f'{op}: recompute must be True or False, got {recompute!r}')
    check_dtypes(
        op,
        {name: x for name, x in named.items() if name not in WIDE},
        {name: x for name, x in named.items() if name in WIDE},
    )


def _with_biases(w):
    absent = {}
    if w.proj_up_bias is None:
        absent['proj_up_bias'] = w.proj_up.new_zeros(len(w.proj_up))
    if w.qkv_bias is None:
        absent['qkv_bias'] = torch.zeros_like(w.qkv[..., 0]).flatten(2)
    if w.norm_bias is None:
        absent['norm_bias'] = torch.zeros_like(w.norm_weight)
    if w.proj_down_bias is None:
        absent['proj_down_bias'] = w.proj_down.new_zeros(len(w.proj_down))
    return w._replace(**absent)


class _Direction:
    """One direction in the terms of a backend's parts, which know none of its kinds.

    The convolution is `taps` (E, rows, columns) on `grid`, the tap at `origin` on the token
    itself: a sequence is a grid of one row, and a reversed direction has its taps flipped. The
    gates are linear in q, k and v, these in c and x, so that `gates_c` c + `gates_x` x +
    `gates_bias` gives them, with weights (2 H, E) in the accumulator's type.
    """

    def __init__(self, w, s, grid, reverse, columns):
        self.reverse, self.columns = bool(reverse[s]), bool(columns[s])
        self.rows_first = tuple(grid)
        taps = w.conv_weight[s]
        self.conv_shape = taps.shape
        if taps.dim() == 3:
            self.grid = tuple(reversed(grid)) if self.columns else self.rows_first
            self.origin = taps.shape[1] // 2, taps.shape[2] // 2
        else:
            taps, self.grid = taps.unsqueeze(1), (1, grid[0] * grid[1])
            self.origin = 0, 0 if self.reverse else taps.shape[2] - 1
        self.taps = self.flip(taps)
        self.conv_bias = w.conv_bias[s]
        self.qkv, self.qkv_bias = w.qkv[s], w.qkv_bias[s]
        self.norm = w.norm_weight[s], w.norm_bias[s], w.skip[s]

        self.dtype = widest_dtype(w.qkv, w.gates)
        self.gates = w.gates[s].to(self.dtype).unflatten(1, self.qkv.shape[:3])
        of_q, of_k, of_v = torch.einsum('jngo,ngod->njgd', self.gates, self.qkv.to(self.dtype))
        self.gates_c, self.gates_x = (of_q + of_k).flatten(1), of_v.flatten(1)
        bias = self.qkv_bias.to(self.dtype).flatten()
        self.gates_bias = w.gates_bias[s].to(self.dtype) + self.gates.flatten(1) @ bias

    def flip(self, taps):
        return taps.flip(-2, -1) if self.reverse else taps

    def arrange(self, x):
        """(B, L, ·) from the order of the rows to that of this direction."""
        if not self.columns:
            return x
        return x.unflatten(1, self.rows_first).transpose(1, 2).flatten(1, 2)

    def restore(self, x):
        """The inverse of `arrange`."""
        if not self.columns:
            return x
        return x.unflatten(1, self.rows_first[::-1]).transpose(1, 2).flatten(1, 2)

    def pre(self, ops, x):
        """c (B, L, E), q, k, v (B, L, H, E / H), i, f (B, L, H)."""
        return ops.pre(
            x,
            self.taps,
            self.conv_bias,
            self.qkv,
            self.qkv_bias,
            self.gates_c,
            self.gates_x,
            self.gates_bias,
            self.grid,
            self.origin,
        )

    def post(self, ops, h, c, z):
        """The gated output (B, L, E), in the order of the rows."""
        return self.restore(ops.post(h, c, self.arrange(z), *self.norm, NORM_EPS))

    def pre_backward(self, ops, dc, cell_grads, x, c, dx):
        """Writes dx; returns the gradients of conv_weight to gates_bias, as in `Weights`."""
        dtaps, dconv_bias, dqkv, dqkv_bias, dgates_c, dgates_x, dgates_bias = ops.pre_backward(
            dc,
            *cell_grads,
            x,
            c,
            self.taps,
            self.conv_bias,
            self.qkv,
            self.gates_c,
            self.gates_x,
            self.grid,
            self.origin,
            dx,
        )
        dfolded = torch.stack([dgates_c, dgates_c, dgates_x]).unflatten(2, self.qkv.shape[1:3])
        dgates = torch.einsum('njgd,ngod->jngo', dfolded, self.qkv.to(self.dtype)).flatten(1)
        dgates += torch.outer(dgates_bias, self.qkv_bias.to(self.dtype).flatten())
        dqkv = dqkv + torch.einsum('jngo,njgd->ngod', self.gates, dfolded)
        dqkv_bias = dqkv_bias + torch.einsum('j,jngo->ngo', dgates_bias, self.gates).flatten(1)
        dconv_weight = self.flip(dtaps).reshape(self.conv_shape)
        return dconv_weight, dconv_bias, dqkv, dqkv_bias, dgates, dgates_bias


@torch.library.custom_op(
    'visionseq_mm::vil_mixer',
    mutates_args=(),
    schema=(
        '(Tensor tokens, Tensor[] weights, int[] reverse, int[] columns, str keep, str backend) '
        '-> Tensor[]'
    ),
)
def _forward(tokens, weights, reverse, columns, keep, backend):
    """The output and what to keep for the backward, of tokens on their grid (B, h, w, D).

    For 'cells' h and its sums of each direction; for 'all' x and z before them, and c, q, k, v, i
    and f before each h.
    """
    ops, w = BACKENDS[backend], Weights(*weights)
    grid = tokens.shape[1:3]
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, (to_x, to_z) = tokens.flatten(1, 2), _projections_up(w)
        x, z, y = linear(tokens, *to_x), None, None
        kept = []
        if keep == 'all':
            z = linear(tokens, *to_z)
            kept = [x, z]
        for s in range(len(reverse)):
            direction = _Direction(w, s, grid, reverse, columns)
            c, *inputs = direction.pre(ops, direction.arrange(x))
            if s == len(reverse) - 1:
                del x
            h, sums = ops.cell(*inputs, direction.reverse, CELL_EPS)
            if keep == 'all':
                kept += [c, *inputs]
            del inputs
            if keep != 'nothing':
                kept += [h, sums]
            if z is None:  # not beside what only the cell needs
                z = linear(tokens, *to_z)
            gated = direction.post(ops, h, c, z)
            del c, h
            y = gated if y is None else y.add_(gated)
        out = linear(y, w.proj_down, w.proj_down_bias)
        return [out.unflatten(1, grid), *kept]


def _projections_up(w):
    """Weights and biases of x, and of z."""
    return zip(w.proj_up.chunk(2), w.proj_up_bias.chunk(2), strict=True)


@_forward.register_fake
def _(tokens, weights, reverse, columns, keep, backend):
    w = Weights(*weights)
    B, L = len(tokens), tokens.shape[1] * tokens.shape[2]
    E, H = w.skip.shape[1], w.gates_bias.shape[1] // 2

    def new(*shape, dtype=None):
        return tokens.new_empty(shape, dtype=dtype)

    wide = widest_dtype(tokens)
    kept = [new(B, L, E), new(B, L, E)] if keep == 'all' else []
    for _ in reverse:
        if keep == 'all':
            kept += [new(B, L, E), *(new(B, L, H, E // H) for _ in 'qkv')]
            kept += [new(B, L, H, dtype=wide) for _ in 'if']
        if keep != 'nothing':
            kept += [new(B, L, H, E // H), new(B * H, L, dtype=wide)]
    return [new(*tokens.shape), *kept]


@torch.library.custom_op(
    'visionseq_mm::vil_mixer_backward',
    mutates_args=(),
    schema=(
        '(Tensor dout, Tensor tokens, Tensor[] weights, Tensor[] kept, int[] reverse, '
        'int[] columns, str backend) -> Tensor[]'
    ),
)
def _backward(dout, tokens, weights, kept, reverse, columns, backend):
    """Gradients of the tokens and of the weights."""
    ops, w = BACKENDS[backend], Weights(*weights)
    S = len(reverse)
    grid, inputs = tokens.shape[1:3], (tokens, *weights)
    tokens, dout = tokens.flatten(1, 2), dout.flatten(1, 2)
    everything = len(kept) > 2 * S
    with torch.autocast(tokens.device.type, enabled=False):
        x, z = kept[:2] if everything else (linear(tokens, *p) for p in _projections_up(w))
        cells = kept[2:] if everything else kept
        dxz = tokens.new_empty((*tokens.shape[:2], len(w.proj_up)))
        dy = input_gradient(dout, w.proj_down)
        y, of_directions = None, []
        for s in range(S):
            direction = _Direction(w, s, grid, reverse, columns)
            x_s, z_s = direction.arrange(x), direction.arrange(z)
            *of_cell, h, sums = cells[s * len(cells) // S : (s + 1) * len(cells) // S]
            c, *of_cell = of_cell or direction.pre(ops, x_s)
            dxz_s = dxz if s == 0 and not direction.columns else torch.empty_like(dxz)
            dx_s, dz_s = dxz_s.chunk(2, -1)
            gated, dh, dc, *dnorm = ops.post_backward(
                direction.arrange(dy), h, c, z_s, *direction.norm, NORM_EPS, dz_s
            )
            cell_grads = ops.cell_backward(dh, *of_cell, h, sums, direction.reverse, CELL_EPS)
            del of_cell, dh
            dpre = direction.pre_backward(ops, dc, cell_grads, x_s, c, dx_s)
            of_directions.append([*dpre, *dnorm])
            del cell_grads, dc, c
            gated = direction.restore(gated)
            y = gated if y is None else y.add_(gated)
            if s > 0:
                dxz += direction.restore(dxz_s)
            elif direction.columns:
                dxz.copy_(direction.restore(dxz_s))
        grads = (
            input_gradient(dxz, w.proj_up).unflatten(1, grid),
            weight_gradient(dxz, tokens),
            dxz.sum((0, 1)),
            *(torch.stack(of_each) for of_each in zip(*of_directions, strict=True)),
            weight_gradient(dout, y),
            dout.sum((0, 1)),
        )
    return [dx.to(x.dtype).contiguous() for dx, x in zip(grads, inputs, strict=True)]


@_backward.register_fake
def _(dout, tokens, weights, kept, reverse, columns, backend):
    return [x.new_empty(x.shape) for x in (tokens, *weights)]


def _save(ctx, inputs, output):
    tokens, weights, ctx.reverse, ctx.columns, _, ctx.backend = inputs
    ctx.save_for_backward(tokens, *weights, *output[1:])


def _differentiate(ctx, grads):
    saved = ctx.saved_tensors  # to be read once: recomputation hands them out a single time
    count = 1 + len(Weights._fields)
    tokens, *weights = saved[:count]
    kept = list(saved[count:])
    directions = ctx.reverse, ctx.columns
    if not kept:  # a graph that was made without gradients
        kept = _forward(tokens, weights, *directions, 'cells', ctx.backend)[1:]
    dtokens, *dweights = _backward(grads[0], tokens, weights, kept, *directions, ctx.backend)
    return dtokens, dweights, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _flops(tokens, weights):
    """Operations before the cells, of the cells, and of the projection down."""
    w = Weights(*weights)
    B, rows, columns, D = tokens
    L = rows * columns
    S, E, *kernel = w.conv_weight
    H = w.gates_bias[1] // 2
    taps = kernel[0] * kernel[-1] if len(kernel) == 2 else kernel[0]
    before = 2 * B * L * E * (2 * D + S * (taps + 3 * BLOCK + 3 * 2 * H))
    return before, S * mlstm_flops((B, L, H, E // H)), 2 * B * L * E * D


@register_flop_formula(torch.ops.visionseq_mm.vil_mixer)
def mixer_flops(tokens, weights, *args, **kwargs) -> int:
    """Operations of a layer with inputs of these shapes, the cells' as `mlstm_flops` has them.

    Two for a multiplication and addition of projections, convolution and gates, as torch counts.
    """
    return sum(_flops(tokens, weights))


@register_flop_formula(torch.ops.visionseq_mm.vil_mixer_backward)
def _backward_flops(dout, tokens, weights, kept, reverse, *args, **kwargs):
    """Two for one of the forward pass, half of the cells' again, and what was not kept."""
    before, cells, after = _flops(tokens, weights)
    recomputed = before if len(kept) == 2 * len(reverse) else 0
    return 2 * (before + cells + after) + cells // 2 + recomputed
