"""Our ops beside other implementations of them, on the same random inputs.

An op of the table OPS is its inputs, our function, and its peers; the first contestant is ours,
and the others are compared with it: time, memory, result and every gradient.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import common, memory, peers
from benchmarks.timing import Deadline, alternate, explain

MODULE = 'benchmarks.ops'
OURS = 'ours'
KINDS = ('forward', 'step')
FIRST_ONLY = 'not run: slow to compile, first shape only'

BLANK = dict.fromkeys(
    ('peak_mib', 'kept_mib', 'error_out', 'error_grad', 'error_grad_of', 'agrees')
)


@dataclass(frozen=True)
class Shape:
    """Batch, tokens, (inner) channels, states."""

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


SHAPES = {
    # Slow contestants are tried at the first; 4097 tokens are those with a class token.
    'cuda': [
        *(Shape(8, L, D) for D in (384, 768) for L in (4096, 4097)),
        Shape(1, 4096, 384),
    ],
    'cpu': [Shape(1, 4096, 384)],
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
    """

    build: Callable[[peers.Inputs], peers.Call]
    prepare: Callable[[peers.Inputs], peers.Inputs] = dict
    restore: Callable[..., Tensor] = lambda out: out
    backend: str | None = None
    slow: bool = False


@dataclass(frozen=True)
class Op:
    """What to compare.

    Attributes:
        inputs: a shape and dtype to random inputs by name.
        contestants: ours first.
        activations: the inputs that are not weights.
        exps: exponentials of the recurrence in a forward pass, for the floor of a GPU.
    """

    inputs: Callable[[Shape, torch.dtype], dict[str, Tensor]]
    contestants: dict[str, Contestant]
    activations: tuple[str, ...]
    exps: Callable[[Shape], int] | None = None


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


# -------------------------------------------------------------------------- ours


def ours(name: str) -> Callable[[peers.Inputs], peers.Call]:
    """The public function `name` of visionseq_mm.ops."""

    def build(p):
        from visionseq_mm import ops

        function = getattr(ops, name)
        return lambda: function(**p)

    return build


def our_mixer(p: peers.Inputs, recompute: bool = True) -> peers.Call:
    mixer = _mixer(p['tokens'].shape[-1], recompute)
    for name, leaf in p.items():
        if name != 'tokens':
            owner, _, own = name.rpartition('.')
            setattr(mixer.get_submodule(owner), own, leaf)
    return lambda: mixer(p['tokens'])


def with_reference(build: Callable[[peers.Inputs], peers.Call]) -> dict[str, Contestant]:
    return {OURS: Contestant(build), 'reference': Contestant(build, backend='reference')}


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
        exps=lambda s: s.B * s.L * s.D * s.N,
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
        exps=lambda s: 2 * s.B * s.L * s.D * s.N,
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
        exps=lambda s: 2 * s.B * s.L * s.D * s.N,
    ),
}


# --------------------------------------------------------------------- measuring


class Entry:
    """A contestant with inputs of its own; its results in the op's layout."""

    def __init__(self, contestant: Contestant, inputs: dict[str, Tensor], backend: str | None):
        self.restore = contestant.restore
        self.backend = contestant.backend or backend
        self.inputs = inputs
        self.prepared = contestant.prepare(inputs)
        # Parameters, so that a module can own them.
        self.leaves = {
            name: nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format))
            for name, x in self.prepared.items()
        }
        self.call = contestant.build(self.leaves)

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

    def agree(self, dout: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Result and gradients of the op's inputs; `dout` is drawn at random if None."""
        probes = [x.requires_grad_() for x in self.forward()]
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
    inputs = {k: x.to(device).requires_grad_() for k, x in op.inputs(shape, dtype).items()}
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
            extras[label] = _memory(op, contestant, entry, device)
        except Exception as error:
            if label == OURS:
                raise
            reasons[label] = explain(error)
            continue
        if label == OURS:
            result, grads = own_result, own_grads
        else:
            extras[label].update(agreement(own_result, result, own_grads, grads, dtype))
        del own_result, own_grads
        entries[label] = entry
    rate = exp_rate(device)
    floor = op.exps(shape) / rate * 1e3 if op.exps and rate else None
    rows = []
    for kind in KINDS:
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
                **extra,
            )
            rows.append(row)
    return rows


def rms_error(x: Tensor, y: Tensor) -> float:
    """Root mean square of the difference over that of `y`."""
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm()).item()


def agreement(
    result: Tensor,
    expected: Tensor,
    grads: dict[str, Tensor],
    expected_grads: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict:
    """Errors of the result and of the worst gradient, and whether rounding explains both."""
    errors = {name: rms_error(grads[name], expected_grads[name]) for name in grads}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    out, limit = rms_error(result, expected), 5e-2 if dtype.itemsize == 2 else 1e-3
    return dict(
        error_out=out,
        error_grad=errors[worst],
        error_grad_of=worst,
        agrees=out <= limit and errors[worst] <= limit,  # never for NaN
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
            kind: memory.cuda_peak(getattr(entry, kind), device) for kind in KINDS
        }
    return result


# --------------------------------------------------------------------------- CLI


def floor_cell(row):
    if row['floor_ms'] is None or row['median_ms'] is None:
        return ''
    return common.number(row['median_ms'] / row['floor_ms'])


def error_cell(row):
    if row['error_out'] is None:
        return ''
    text = f'{row["error_out"]:.0e}, {row["error_grad"]:.0e} ({row["error_grad_of"]})'
    return text if row['agrees'] else f'**{text}**'


COLUMNS = {
    'B×L×D': lambda row: str(Shape(**row['shape'])),
    'pass': lambda row: row['kind'],
    'implementation': lambda row: row['contestant'],
    'ms (20–80 %)': common.timing_cell,
    '× ours': lambda row: common.number(row['ratio']),
    '× exp floor': floor_cell,
    'peak MiB': lambda row: common.number(row['peak_mib']),
    'kept MiB': lambda row: common.number(row['kept_mib']),
    'error of result, worst gradient': error_cell,
}


def main() -> int:
    parser = common.parser(MODULE, __doc__.splitlines()[0], minutes=5)
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
    deadline = Deadline(args.minutes)
    rate = exp_rate(device)
    if rate:
        report.note(f'Floor, derived: {rate / 1e12:.2f}e12 exponentials per second.')
    wrong, failed = [], False
    for name in args.op:
        report.table(f'{name}, {str(dtype).removeprefix("torch.")}', COLUMNS)
        for i, shape in enumerate(args.shape or SHAPES[device.type]):
            reason = deadline.reason()
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
