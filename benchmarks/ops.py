"""Our ops beside other implementations of them, on the same random inputs.

An op of the table OPS is its inputs, our function, and its peers; the first contestant is ours,
and the others are compared with it: time, memory, result and every gradient. `vil_pre` and
`vil_post` are the parts of `vil_mixer` before and after the cell; `sec_partition` and
`sec_attention` are those of `cluster_attention`; the depth-wise convolutions are SecViT's, of 3×3
with a residual that of its FFN, of 5×5 that of its values.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks import common, memory, peers
from benchmarks.timing import Deadline, alternate, explain

MODULE = 'benchmarks.ops'
OURS = 'ours'
KINDS = ('forward', 'step')
FIRST_ONLY = 'not run: slow to compile, first shape only'
HEADS = 4  # of an mLSTM
HEAD_CHANNELS = 32  # of a SecViT, but two heads at least
EXP, HBM = 'exp', 'HBM'  # exponentials, bytes of memory

BLANK = dict.fromkeys(
    ('peak_mib', 'kept_mib', 'error_out', 'error_grad', 'error_grad_of', 'agrees')
)


@dataclass(frozen=True)
class Shape:
    """Batch, tokens, (inner) channels of all heads, states of a scan or clusters of tokens."""

    B: int
    L: int
    D: int
    N: int = 16

    @classmethod
    def parse(cls, text: str) -> 'Shape':
        sizes = [int(part) for part in text.split('x')]
        if len(sizes) not in (3, 4) or min(sizes) < 1:
            raise argparse.ArgumentTypeError(f'expected BxLxD or BxLxDxN, got {text!r}')
        return cls(*sizes)

    def __str__(self):
        return f'{self.B}×{self.L}×{self.D}'


# Those of the models at 1024×1024 pixels; slow contestants are tried at the first.
VIM_SHAPES = {
    # 4097 tokens are those with a class token.
    'cuda': [
        *(Shape(8, L, D) for D in (384, 768) for L in (4096, 4097)),
        Shape(1, 4096, 384),
    ],
    'cpu': [Shape(1, 4096, 384)],
}
VIL_SHAPES = {
    'cuda': [Shape(8, 4096, HEADS * channels) for channels in (96, 192, 384)],
    'cpu': [Shape(1, 4096, 384)],
}
# Those of SecViT-T and -S.
STAGES = [(65536, 64, 32), (16384, 128, 8), (4096, 256, 2), (1024, 512, 1)]
SEC_SHAPES = {
    'cuda': [Shape(8, *stage) for stage in STAGES],
    'cpu': [Shape(1, *STAGES[0]), Shape(1, *STAGES[2])],
}
FFN_SHAPES = {
    device: [Shape(s.B, s.L, 3 * s.D) for s in shapes] for device, shapes in SEC_SHAPES.items()
}
DTYPES = {'cuda': 'bfloat16', 'cpu': 'float32'}


@dataclass(frozen=True)
class Contestant:
    """One implementation.

    Attributes:
        build: its inputs to what is timed; an ImportError there says what is not installed.
        prepare: the op's inputs to its own, differentiable.
        restore: its results to the op's, differentiable.
        backend: of ours, where it is not the one under test.
        slow: takes so long to compile that only the first shape is tried.
        differs: why its result is another one, where only its time compares.
        other_gradients: why its gradients are others, where they do not compare.
    """

    build: Callable[[peers.Inputs], peers.Call]
    prepare: Callable[[peers.Inputs], peers.Inputs] = dict
    restore: Callable[..., Tensor] = lambda out: out
    backend: str | None = None
    slow: bool = False
    differs: str | None = None
    other_gradients: str | None = None


@dataclass(frozen=True)
class Op:
    """What to compare.

    Attributes:
        inputs: a shape and dtype to random inputs by name.
        contestants: ours first.
        activations: the inputs that are not weights.
        floor: what a forward pass cannot do without on a GPU, of a shape and the bytes of an
            element: exponentials or bytes of memory, by what they are a number of.
        step_floor: how many times that a forward and backward pass has it, where that is known.
        shapes: to try on a kind of device.
        compared: what of a result without gradients is compared, of it and the inputs; the op
            then has a forward pass only.
        slack: an error to allow in any dtype, where rounding decides more than digits.
    """

    inputs: Callable[[Shape, torch.dtype], peers.Inputs]
    contestants: dict[str, Contestant]
    activations: tuple[str, ...]
    floor: tuple[str, Callable[[Shape, int], int]] | None = None
    step_floor: int | None = None
    shapes: dict[str, list[Shape]] = field(default_factory=lambda: VIM_SHAPES)
    compared: Callable[[Tensor, peers.Inputs], Tensor] | None = None
    slack: float = 0.0

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS[:1] if self.compared else KINDS


# ------------------------------------------------------------------------ inputs


def step_bias(*shape: int) -> Tensor:
    """softplus(bias) is log-uniform in [1e-3, 1e-1], as Mamba starts."""
    dt = torch.empty(shape).uniform_(-6.9, -2.3).exp()
    return dt + torch.log(-torch.expm1(-dt))


def scan_inputs(s: Shape, dtype: torch.dtype, directions: tuple[int, ...] = ()):
    """Of one direction, or of several stacked in the first dimension of all but z."""

    def draw(*shape):
        return torch.randn(*shape).to(dtype)

    A = -torch.arange(1, s.N + 1).float() * torch.empty(*directions, s.D, 1).uniform_(0.8, 1.2)
    return dict(
        u=draw(*directions, s.B, s.L, s.D),
        dt=0.5 * draw(*directions, s.B, s.L, s.D),
        A=A,
        B=draw(*directions, s.B, s.L, s.N),
        C=draw(*directions, s.B, s.L, s.N),
        D=torch.randn(*directions, s.D),
        z=draw(s.B, s.L, s.D),
        dt_bias=step_bias(*directions, s.D),
    )


def conv_inputs(s: Shape, dtype: torch.dtype):
    return dict(
        x=torch.randn(s.B, s.L, s.D).to(dtype),
        weight=(0.5 * torch.randn(2, s.D, 4)).to(dtype),
        bias=torch.randn(2, s.D).to(dtype),
    )


def _mixer(embed_dims, recompute=True):
    from visionseq_mm.backbones.vim import VimMixer

    return VimMixer(embed_dims, depth=24, recompute=recompute)


def mixer_inputs(s: Shape, dtype: torch.dtype):
    """Tokens and a mixer's parameters; what drives the recurrence stays in float32."""
    mixer = _mixer(s.D // 2)
    result = dict(tokens=torch.randn(s.B, s.L, s.D // 2).to(dtype))
    for name, parameter in mixer.named_parameters():
        x = parameter.detach() + 0.02 * torch.randn_like(parameter)
        if name.startswith('dt_proj') and name.endswith('bias'):
            x = step_bias(*x.shape)
        elif not name.startswith(('A_', 'D')):
            x = x.to(dtype)
        result[name] = x
    return result


def mlstm_inputs(s: Shape, dtype: torch.dtype):
    """Gates in float32, as the layer makes them, forgetting as at the start of training.

    Queries and keys have a mean: the normaliser is a sum that does not cancel, which would
    compare nothing but how implementations round.
    """

    def draw(mean):
        return (mean + torch.randn(s.B, s.L, HEADS, s.D // HEADS)).to(dtype)

    def gate():
        return torch.randn(s.B, s.L, HEADS)

    return dict(
        q=draw(0.5),
        k=draw(0.5),
        v=draw(0.0),
        i=gate(),
        f=gate() + torch.linspace(3, 6, HEADS),
    )


def _layer(embed_dims, recompute=True):
    from visionseq_mm.backbones.vil import Path, ViLLayer

    return ViLLayer(embed_dims, 2, (Path(),), shared=False, recompute=recompute)


def layer_inputs(s: Shape, dtype: torch.dtype):
    """Tokens and a ViL layer's parameters; gates, norm and skip stay in float32."""
    result = dict(tokens=torch.randn(s.B, s.L, s.D // 2).to(dtype))
    for name, parameter in _layer(s.D // 2).named_parameters():
        x = parameter.detach() + 0.02 * torch.randn_like(parameter)
        result[name] = x if name.startswith(('mlstm_cell', 'learnable_skip')) else x.to(dtype)
    return result


def pre_inputs(s: Shape, dtype: torch.dtype):
    x, E = torch.randn(s.B, s.L, s.D), s.D
    weights = dict(
        conv_weight=torch.randn(E, 3, 3) / 3,
        conv_bias=torch.randn(E),
        qkv=torch.randn(3, E // 4, 4, 4) / 2,
        qkv_bias=torch.randn(3, E),
    )
    return dict(
        x=x.to(dtype),
        **{name: weight.to(dtype) for name, weight in weights.items()},
        gates=torch.randn(2 * HEADS, 3 * E) / E**0.5,
        gates_bias=torch.randn(2 * HEADS),
    )


def post_inputs(s: Shape, dtype: torch.dtype):
    sequences = dict(h=(HEADS, s.D // HEADS), c=(s.D,), z=(s.D,))
    return dict(
        **{name: torch.randn(s.B, s.L, *rest).to(dtype) for name, rest in sequences.items()},
        norm_weight=1 + 0.1 * torch.randn(s.D),
        norm_bias=torch.randn(s.D),
        skip=torch.randn(s.D),
    )


def heads_of(channels: int) -> int:
    return max(2, channels // HEAD_CHANNELS)


def partition_inputs(s: Shape, dtype: torch.dtype):
    H = heads_of(s.D)
    return dict(k=torch.randn(s.B, s.L, H, s.D // H).to(dtype), num_clusters=s.N)


def attention_inputs(s: Shape, dtype: torch.dtype, ordered: bool = False):
    from visionseq_mm.ops import sec_partition

    H = heads_of(s.D)
    draws = {name: torch.randn(s.B, s.L, H, s.D // H).to(dtype) for name in ('q', 'k', 'v')}
    order = dict(idx=sec_partition(draws['k'], s.N, backend='reference')) if ordered else {}
    lepe = torch.randn_like(draws['v'])
    return dict(**draws, lepe=lepe, **order, num_clusters=s.N)


def rotary_inputs(s: Shape, dtype: torch.dtype):
    H = heads_of(s.D)
    shape = s.B, *peers.grid(s.L), H, s.D // H
    return {name: torch.randn(shape).to(dtype) for name in ('q', 'k')}


def depthwise_inputs(s: Shape, dtype: torch.dtype, side: int, residual: bool):
    return dict(
        x=torch.randn(s.B, *peers.grid(s.L), s.D).to(dtype),
        weight=(torch.randn(s.D, 1, side, side) / side).to(dtype),
        bias=torch.randn(s.D).to(dtype),
        residual=residual,
    )


def cluster_of(idx: Tensor, p: peers.Inputs) -> Tensor:
    """The cluster of each token, (B, H, L), for an order of the tokens."""
    from visionseq_mm.ops.cluster_attention import cluster_labels

    return cluster_labels(idx, p['num_clusters'])


# -------------------------------------------------------------------------- ours


def ours(name: str) -> Callable[[peers.Inputs], peers.Call]:
    """The public function `name` of visionseq_mm.ops."""

    def build(p):
        from visionseq_mm import ops

        function = getattr(ops, name)
        return lambda: function(**p)

    return build


def _with_parameters(module: nn.Module, p: peers.Inputs) -> nn.Module:
    for name, leaf in p.items():
        if name != 'tokens':
            owner, _, own = name.rpartition('.')
            setattr(module.get_submodule(owner), own, leaf)
    return module


def our_mixer(p: peers.Inputs, recompute: bool = True) -> peers.Call:
    mixer = _with_parameters(_mixer(p['tokens'].shape[-1], recompute), p)
    return lambda: mixer(p['tokens'])


def our_layer(p: peers.Inputs, recompute: bool = True) -> peers.Call:
    layer = _with_parameters(_layer(p['tokens'].shape[-1], recompute), p)
    grid = peers.grid(p['tokens'].shape[1])
    return lambda: layer(p['tokens'], grid)


def _parts(x):
    """The backend's module with the parts of a ViL layer."""
    from visionseq_mm.ops.vil_mixer import BACKENDS

    return BACKENDS[BACKENDS.select(None, x)]


class Pre(torch.autograd.Function):
    """The part before the cell, with its own backward pass."""

    @staticmethod
    def forward(ctx, x, taps, conv_bias, qkv, qkv_bias, gates_c, gates_x, gates_bias):
        ctx.place = peers.grid(x.shape[1]), (1, 1)
        weights = taps, conv_bias, qkv, qkv_bias, gates_c, gates_x, gates_bias
        c, *inputs = _parts(x).pre(x, *weights, *ctx.place)
        ctx.save_for_backward(x, c, taps, conv_bias, qkv, gates_c, gates_x)
        return c, *inputs

    @staticmethod
    def backward(ctx, *grads):
        x, *rest = ctx.saved_tensors
        dx = torch.empty_like(x)
        return dx, *_parts(x).pre_backward(*grads, x, *rest, *ctx.place, dx)


class Post(torch.autograd.Function):
    """The part after the cell, with its own backward pass."""

    @staticmethod
    def forward(ctx, h, c, z, norm_weight, norm_bias, skip):
        ctx.save_for_backward(h, c, z, norm_weight, norm_bias, skip)
        return _parts(h).post(h, c, z, norm_weight, norm_bias, skip, 1e-5)

    @staticmethod
    def backward(ctx, dy):
        z = ctx.saved_tensors[2]
        dz = torch.empty_like(z)
        _, dh, dc, *rest = _parts(z).post_backward(dy, *ctx.saved_tensors, 1e-5, dz)
        return dh, dc, dz, *rest


def part(function: type[torch.autograd.Function]) -> Callable[[peers.Inputs], peers.Call]:
    return lambda p: lambda: function.apply(*p.values())


def fold_gates(p: peers.Inputs) -> peers.Inputs:
    """Gates of q, k and v as gates of c and x, in the order of `Pre`: once for each layer."""
    qkv, gates = p['qkv'].float(), p['gates'].unflatten(1, p['qkv'].shape[:3])
    of_q, of_k, of_v = torch.einsum('jngo,ngod->njgd', gates, qkv)
    return dict(
        x=p['x'],
        taps=p['conv_weight'],
        **{name: p[name] for name in ('conv_bias', 'qkv', 'qkv_bias')},
        gates_c=(of_q + of_k).flatten(1),
        gates_x=of_v.flatten(1),
        gates_bias=p['gates_bias'] + p['gates'] @ p['qkv_bias'].float().flatten(),
    )


def side_by_side(*results: Tensor) -> Tensor:
    """(B, L, ·) of several sequences as one."""
    return torch.cat([x.flatten(2) for x in results], -1)


def with_reference(
    build: Callable[[peers.Inputs], peers.Call], **adapters: Callable
) -> dict[str, Contestant]:
    return {
        OURS: Contestant(build, **adapters),
        'reference': Contestant(build, **adapters, backend='reference'),
    }


def mlstm_bytes(s: Shape, size: int) -> int:
    """q, k, v, gates read and h written once; states of every 256th token written and read."""
    tokens, sequences, channels = s.B * s.L, s.B * HEADS, s.D // HEADS
    states = -(-s.L // 256) * sequences * channels * (channels + 1)
    return size * (4 * tokens * s.D + 2 * states) + 4 * 2 * tokens * HEADS


def pre_bytes(s: Shape, size: int) -> int:
    """x read, c, q, k, v and the gates written."""
    return s.B * s.L * (5 * s.D * size + 4 * 2 * HEADS)


def attention_exps(s: Shape, size: int) -> int:
    """One for each pair of tokens of a cluster, in each head."""
    borders = [c * s.L // s.N for c in range(s.N + 1)]
    return s.B * heads_of(s.D) * sum((b - a) ** 2 for a, b in pairwise(borders))


def partition_bytes(s: Shape, size: int) -> int:
    """Keys read for their mean and again for the cosines, the order written."""
    return s.B * s.L * (2 * s.D * size + 4 * heads_of(s.D))


def depthwise(side: int, residual: bool, shapes: dict[str, list[Shape]]) -> Op:
    return Op(
        inputs=partial(depthwise_inputs, side=side, residual=residual),
        contestants={
            **with_reference(ours('depthwise_conv2d')),
            'torch, channels last': Contestant(peers.by_name(peers.depthwise_of_tokens)),
            'torch, channels first': Contestant(
                peers.by_name(peers.plain_depthwise),
                peers.channels_first_map,
                peers.channels_last_map,
            ),
        },
        activations=('x',),
        floor=(HBM, lambda s, size: 2 * s.B * s.L * s.D * size),
        shapes=shapes,
    )


def around_cell(
    ours: type[torch.autograd.Function], official: Callable, **adapters: Callable
) -> dict[str, Contestant]:
    """A part beside the official operations, eager and compiled."""
    restore = dict(restore=adapters['restore']) if 'restore' in adapters else {}
    return {
        **with_reference(part(ours), **adapters),
        'eager': Contestant(peers.by_name(official), peers.same_dtype, **restore),
        'torch.compile': Contestant(
            peers.compiled(official), peers.same_dtype, **restore, slow=True
        ),
    }


OPS = {
    'selective_scan': Op(
        inputs=scan_inputs,
        contestants={
            **with_reference(ours('selective_scan')),
            'mamba-ssm': Contestant(
                peers.mamba_scan, peers.channels_first, restore=lambda out: out.mT
            ),
        },
        activations=('u', 'dt', 'B', 'C', 'z'),
        floor=(EXP, lambda s, size: s.B * s.L * s.D * s.N),
    ),
    'bidirectional_scan': Op(
        inputs=lambda s, dtype: scan_inputs(s, dtype, directions=(2,)),
        contestants={
            **with_reference(ours('bidirectional_scan')),
            'mamba-ssm twice': Contestant(
                peers.mamba_scan_twice, peers.split_directions, restore=lambda out: out.mT
            ),
            'torch.compile': Contestant(peers.compiled(peers.plain_bidirectional), slow=True),
        },
        activations=('u', 'dt', 'B', 'C', 'z'),
        floor=(EXP, lambda s, size: 2 * s.B * s.L * s.D * s.N),
    ),
    'conv1d_silu': Op(
        inputs=conv_inputs,
        contestants={
            **with_reference(ours('conv1d_silu')),
            'causal-conv1d twice': Contestant(
                peers.causal_conv_twice, peers.conv_input, peers.stack_flipped
            ),
            'torch.compile': Contestant(peers.compiled(peers.plain_conv)),
        },
        activations=('x',),
    ),
    'vim_mixer': Op(
        inputs=mixer_inputs,
        contestants={
            **with_reference(our_mixer),
            'ours, nothing recomputed': Contestant(partial(our_mixer, recompute=False)),
            'official ops': Contestant(peers.vim_mixer),
        },
        activations=('tokens',),
        floor=(EXP, lambda s, size: 2 * s.B * s.L * s.D * s.N),
    ),
    'mlstm': Op(
        inputs=mlstm_inputs,
        contestants={
            **with_reference(ours('mlstm')),
            'mlstm-kernels': Contestant(
                peers.xl_chunk,
                peers.heads_first,
                peers.tokens_first,
                other_gradients='none through the normaliser',
            ),
            'fla simple_gla': Contestant(
                peers.simple_gla,
                peers.no_input_gate,
                differs='no input gates, no normaliser',
            ),
            'official quadratic': Contestant(
                peers.quadratic, peers.heads_first, peers.tokens_first
            ),
            'torch.compile': Contestant(peers.compiled(peers.plain_mlstm), slow=True),
        },
        activations=('q', 'k', 'v', 'i', 'f'),
        floor=(HBM, mlstm_bytes),
        shapes=VIL_SHAPES,
    ),
    'vil_mixer': Op(
        inputs=layer_inputs,
        contestants={
            **with_reference(our_layer),
            'ours, nothing recomputed': Contestant(partial(our_layer, recompute=False)),
            'official ops': Contestant(peers.vil_mixer, peers.same_dtype),
        },
        activations=('tokens',),
        shapes=VIL_SHAPES,
    ),
    'vil_pre': Op(
        inputs=pre_inputs,
        contestants=around_cell(Pre, peers.vil_pre, prepare=fold_gates, restore=side_by_side),
        activations=('x',),
        floor=(HBM, pre_bytes),
        shapes=VIL_SHAPES,
    ),
    'vil_post': Op(
        inputs=post_inputs,
        contestants=around_cell(Post, peers.vil_post),
        activations=('h', 'c', 'z'),
        floor=(HBM, lambda s, size: 4 * s.B * s.L * s.D * size),
        shapes=VIL_SHAPES,
    ),
    'sec_partition': Op(
        inputs=partition_inputs,
        contestants={
            **with_reference(ours('sec_partition')),
            'two argsorts': Contestant(  # alone, of cosines that it is given
                peers.by_name(peers.two_argsorts), peers.only_cosines, peers.only_order
            ),
            'official': Contestant(
                peers.by_name(peers.official_partition), peers.heads_first, peers.only_order
            ),
        },
        activations=('k',),
        floor=(HBM, partition_bytes),
        shapes=SEC_SHAPES,
        compared=cluster_of,
    ),
    'sec_attention': Op(
        inputs=partial(attention_inputs, ordered=True),
        contestants={
            **with_reference(ours('sec_attention')),
            'gather+SDPA': Contestant(
                peers.by_name(peers.gathered_attention), peers.sortable, peers.tokens_first
            ),
            'official': Contestant(
                peers.by_name(peers.official_attention), peers.sortable, peers.tokens_first
            ),
        },
        activations=('q', 'k', 'v', 'lepe'),
        floor=(EXP, attention_exps),
        step_floor=3,  # two kernels of the backward pass have the softmax again
        shapes=SEC_SHAPES,
    ),
    'cluster_attention': Op(
        inputs=attention_inputs,
        contestants={
            **with_reference(ours('cluster_attention')),
            'sort+gather+SDPA': Contestant(
                peers.by_name(peers.gathered_attention), peers.sortable, peers.tokens_first
            ),
            'official': Contestant(
                peers.by_name(peers.official_attention), peers.sortable, peers.tokens_first
            ),
        },
        activations=('q', 'k', 'v', 'lepe'),
        floor=(EXP, attention_exps),
        step_floor=3,
        shapes=SEC_SHAPES,
        slack=2e-2,  # a few tokens at borders are in other clusters
    ),
    'rotary_2d': Op(
        inputs=rotary_inputs,
        contestants={
            **with_reference(ours('rotary_2d'), restore=lambda q, k: torch.stack([q, k])),
            'eager': Contestant(peers.rotary, peers.grid_of_heads, peers.stack_grids),
        },
        activations=('q', 'k'),
        floor=(HBM, lambda s, size: 4 * s.B * s.L * s.D * size),
        shapes=SEC_SHAPES,
    ),
    'depthwise_3x3': depthwise(3, True, FFN_SHAPES),
    'depthwise_5x5': depthwise(5, False, SEC_SHAPES),
}


# --------------------------------------------------------------------- measuring


class Entry:
    """A contestant with inputs of its own; its results in the op's layout."""

    def __init__(self, contestant: Contestant, inputs: peers.Inputs, backend: str | None):
        self.restore = contestant.restore
        self.backend = contestant.backend or backend
        prepared = contestant.prepare(inputs)
        self.inputs, self.prepared = (
            {name: x for name, x in p.items() if peers.differentiable(x)}
            for p in (inputs, prepared)
        )
        # Parameters, so that a module can own them.
        self.leaves = {
            name: nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format))
            for name, x in self.prepared.items()
        }
        self.call = contestant.build(prepared | self.leaves)

    def run(self) -> tuple[Tensor, ...]:
        with common.use_backend(self.backend):
            out = self.call()
        return out if isinstance(out, tuple) else (out,)

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.run()

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the leaves."""
        out = self.run()
        with common.use_backend(self.backend):
            return torch.autograd.grad(out, list(self.leaves.values()), self.own_dout)

    def agree(self, dout: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Result and gradients of the op's inputs; `dout` is drawn at random if None."""
        results = self.forward()
        if not peers.differentiable(results[0]):
            return self.restore(*results), {}, None
        probes = [x.requires_grad_() for x in results]
        out = self.restore(*probes)
        if dout is None:
            dout = torch.randn_like(out)
        own = torch.autograd.grad(out, probes, dout)
        self.own_dout = [x.contiguous() for x in own]
        grads = torch.autograd.grad(
            list(self.prepared.values()),
            list(self.inputs.values()),
            [g.to(x.dtype) for g, x in zip(self.step(), self.prepared.values(), strict=True)],
            retain_graph=True,
            materialize_grads=True,  # of an input that this contestant does not take
        )
        return out.detach(), dict(zip(self.inputs, grads, strict=True)), dout


def exp_rate(device: torch.device) -> float | None:
    """Exponentials per second of a GPU, derived: 16 per multiprocessor and cycle."""
    if device.type != 'cuda':
        return None
    clock = common.nvidia_smi('clocks.max.sm')
    if not clock or not clock.isdigit():
        return None
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count * int(clock) * 1e6


def byte_rate(device: torch.device) -> float | None:
    """Bytes per second of a GPU's memory, derived: 7/8 of two transfers for each clock."""
    if device.type != 'cuda':
        return None
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, 'memory_clock_rate', None)  # kHz
    width = getattr(properties, 'memory_bus_width', None)  # bits
    return 7 / 8 * 2 * clock * 1e3 * width / 8 if clock and width else None


RATES = {EXP: exp_rate, HBM: byte_rate}


def floor_ms(
    op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, kind: str = 'forward'
) -> float | None:
    """Milliseconds of a pass that did only what it cannot do without."""
    rate = op.floor and RATES[op.floor[0]](device)
    times = 1 if kind == 'forward' else op.step_floor
    return times * op.floor[1](shape, dtype.itemsize) / rate * 1e3 if rate and times else None


def compare(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    backend: str | None = None,
    only: list[str] | None = None,
    slow: bool = True,
) -> list[dict]:
    """Rows for one op and shape: two for each contestant, a forward pass and a whole step.

    Args:
        backend: of ours; None is the environment's.
        only: contestants to run beside ours; None is all.
        slow: run those that compile for long too.
    """
    op = OPS[name]
    inputs = op.inputs(shape, dtype)
    for key, x in inputs.items():
        if isinstance(x, Tensor):
            inputs[key] = x.to(device).requires_grad_(peers.differentiable(x))
    entries, reasons, extras = {}, {}, {}
    result = grads = dout = None
    for label, contestant in op.contestants.items():
        if only is not None and label not in (OURS, *only):
            continue
        if contestant.slow and not slow:
            reasons[label] = FIRST_ONLY
            continue
        try:
            entry = Entry(contestant, inputs, backend)
            own_result, own_grads, dout = entry.agree(dout)
            if op.compared:
                own_result = op.compared(own_result, inputs)
            extras[label] = _memory(op, contestant, entry, device)
        except Exception as error:
            if label == OURS:
                raise
            reasons[label] = explain(error)
            continue
        if label == OURS:
            result, grads = own_result, own_grads
        elif not contestant.differs:
            if contestant.other_gradients:
                own_grads = {}
            found = agreement(own_result, result, own_grads, grads, dtype, op.slack)
            extras[label].update(found)
        del own_result, own_grads
        entries[label] = entry
    rows = []
    for kind in op.kinds:
        floor = floor_ms(op, shape, dtype, device, kind)
        calls = {label: getattr(entry, kind) for label, entry in entries.items()}
        outcomes = {**alternate(calls, device, seconds), **reasons}
        if isinstance(outcomes[OURS], str):
            raise RuntimeError(f'{name} {shape}: {outcomes[OURS]}')
        for label in filter(outcomes.get, op.contestants):
            contestant = op.contestants[label]
            own = contestant.backend or label.startswith(OURS)
            extra = dict(BLANK, **extras.get(label, {}))
            extra['peak_mib'] = extra['peak_mib'][kind] if extra['peak_mib'] else None
            row = dict(
                op=name,
                shape=vars(shape),
                dtype=str(dtype).removeprefix('torch.'),
                kind=kind,
                contestant=label,
                backend=common.backend_name(contestant.backend or backend) if own else None,
                **common.timing_fields(outcomes[label], outcomes[OURS].median),
                floor_ms=floor,
                floor_of=None if floor is None else op.floor[0],
                differs=contestant.differs or contestant.other_gradients,
                **extra,
            )
            rows.append(row)
    return rows


def rms_error(x: Tensor, y: Tensor) -> float:
    """Root mean square of the difference over that of `y`; of integers, how many differ of one."""
    if not y.is_floating_point():
        return (x != y).double().mean().item()
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm()).item()


def agreement(
    result: Tensor,
    expected: Tensor,
    grads: dict[str, Tensor],
    expected_grads: dict[str, Tensor],
    dtype: torch.dtype,
    slack: float = 0.0,
) -> dict:
    """Errors of the result and of the worst gradient, and whether rounding explains both.

    There may be no gradients to compare.
    """
    errors = {name: rms_error(grads[name], expected_grads[name]) for name in grads}
    worst = max(
        errors, key=lambda name: (errors[name] != errors[name], errors[name]), default=None
    )
    out = rms_error(result, expected)
    limit = max(slack, 5e-2 if dtype.itemsize == 2 else 1e-3)
    return dict(
        error_out=out,
        error_grad=errors.get(worst),
        error_grad_of=worst,
        agrees=out <= limit and errors.get(worst, 0.0) <= limit,  # never for NaN
    )


def _memory(op, contestant, entry, device):
    """MiB kept for the backward pass and, on a GPU, at the peaks."""
    names = {key: key[0] if isinstance(key, tuple) else key for key in entry.leaves}
    weights = [x for key, x in entry.leaves.items() if names[key] not in op.activations]
    result = {}
    if not contestant.slow:  # hooks would compile it again
        result['kept_mib'] = memory.kept(entry.run, weights)
    if device.type == 'cuda':
        result['peak_mib'] = {
            kind: memory.cuda_peak(getattr(entry, kind), device) for kind in op.kinds
        }
    return result


# --------------------------------------------------------------------------- CLI


def floor_cell(row):
    if row['floor_ms'] is None or row['median_ms'] is None:
        return ''
    return f'{common.number(row["median_ms"] / row["floor_ms"])} ({row["floor_of"]})'


def error_cell(row):
    if row['status'] != 'ok':
        return ''
    if row['error_out'] is None:
        return f'not compared: {row["differs"]}' if row['differs'] else ''
    text = f'{row["error_out"]:.0e}'
    if row['differs']:
        text += f', not compared: {row["differs"]}'
    elif row['error_grad_of']:
        text += f', {row["error_grad"]:.0e} ({row["error_grad_of"]})'
    return text if row['agrees'] else f'**{text}**'


COLUMNS = {
    'B×L×D': lambda row: str(Shape(**row['shape'])),
    'pass': lambda row: row['kind'],
    'implementation': lambda row: row['contestant'],
    'ms (20–80 %)': common.timing_cell,
    '× ours': lambda row: common.number(row['ratio']),
    '× floor': floor_cell,
    'peak MiB': lambda row: common.number(row['peak_mib']),
    'kept MiB': lambda row: common.number(row['kept_mib']),
    'error of result, worst gradient': error_cell,
}


def main() -> int:
    parser = common.parser(MODULE, __doc__.splitlines()[0], minutes=8)
    parser.add_argument('--op', nargs='+', default=list(OPS), choices=list(OPS), help=' ')
    parser.add_argument('--backend', help='of ours: auto, reference, cpu or triton')
    parser.add_argument('--peers', nargs='*', help='only these beside ours; none with no name')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=Shape.parse,
        metavar='BxLxD[xN]',
        help='by default those of the models at 1024×1024 pixels',
    )
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help=' ')
    args = parser.parse_args()
    device = common.start(args)
    dtype = getattr(torch, args.dtype or DTYPES[device.type])
    report = common.Report(MODULE, device, args)
    # An op has its share of the time and what others leave; its first shape is not to miss.
    shares = [Deadline(args.minutes * (n + 1) / len(args.op)) for n in range(len(args.op))]
    for unit, of in (('exponentials', EXP), ('bytes of memory', HBM)):
        if rate := RATES[of](device):
            report.note(f'Floor, derived: {rate / 1e12:.2f}e12 {unit} per second.')
    wrong, failed = [], False
    for share, name in zip(shares, args.op, strict=True):
        report.table(f'{name}, {str(dtype).removeprefix("torch.")}', COLUMNS)
        for i, shape in enumerate(args.shape or OPS[name].shapes[device.type]):
            reason = (share if i else shares[-1]).reason()
            if reason:
                report.say(f'{name} {shape}: {reason}')
                report.data.setdefault('skipped', []).append(f'{name} {shape}: {reason}')
                continue
            try:
                rows = compare(
                    name, shape, dtype, device, args.seconds, args.backend, args.peers, slow=i == 0
                )
            except Exception as error:  # of ours: the others are still worth their time
                traceback.print_exc()
                report.note(f'{name} {shape}: {explain(error)}')
                failed = True
                continue
            for row in rows:
                report.add(row)
            wrong += [row for row in rows if row['agrees'] is False]
    if wrong:
        names = sorted({f'{row["contestant"]} of {row["op"]}' for row in wrong})
        report.note(f'Results differ by more than rounding: {", ".join(names)}.')
    return int(failed or bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
