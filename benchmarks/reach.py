"""The rows that have a target, measured on the device that is there: value beside target."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks import backbones, common, ops
from benchmarks.models import PRECISIONS, Runner
from benchmarks.timing import Deadline, explain

MODULE = 'benchmarks.reach'
NAIVE, SDPA = 'deit-tiny:naive', 'deit-tiny:sdpa'


@dataclass(frozen=True)
class Target:
    """How many times ours the peer's time or memory is to be.

    Attributes:
        what: 'time', 'peak memory' or 'kept memory'.
        least: None where the ratio is only to be reported.
        goal: What would be better still.
    """

    peer: str
    kind: str
    what: str = 'time'
    least: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class OpRow:
    op: str
    shape: ops.Shape
    targets: tuple[Target, ...]

    def __str__(self):
        return f'{self.op}, {self.shape}'

    def measure(self, device, args) -> list[dict]:
        dtype = getattr(torch, ops.DTYPES[device.type])
        peers = list(dict.fromkeys(target.peer for target in self.targets))
        rows = ops.compare(self.op, self.shape, dtype, device, args.seconds, only=peers)
        return [dict(row, label=row['contestant']) for row in rows]


@dataclass(frozen=True)
class BackboneRow:
    size: int
    batch: int
    targets: tuple[Target, ...]
    ours: str = 'vim-tiny'

    def __str__(self):
        return f'{self.ours}, {self.batch}×3×{self.size}×{self.size}'

    def measure(self, device, args) -> list[dict]:
        labels = dict.fromkeys([self.ours, *(target.peer for target in self.targets)])
        runners = [Runner(label, device, args.precision) for label in labels]
        rows = []
        for kind in dict.fromkeys(target.kind for target in self.targets):
            rows += backbones.compare(
                runners, self.size, self.batch, kind, args.seconds, args.threads
            )
        return [
            dict(row, label=ops.OURS if row['model'] == self.ours else row['model'])
            for row in rows
        ]


def scan_targets(forward: float, step: float) -> tuple[Target, ...]:
    peer = 'mamba-ssm twice'
    return Target(peer, 'forward', least=forward), Target(peer, 'step', least=step)


#: 2.8 times faster and 86.8 % less memory are the Vim paper's, on an A100.
ROWS = {
    'cuda': [
        *(
            OpRow('bidirectional_scan', ops.Shape(8, L, D), scan_targets(*least))
            for D in (384, 768)
            for L, least in ((4096, (1.5, 2.5)), (4097, (2.5, 4.0)))
        ),
        OpRow(
            'vim_mixer',
            ops.Shape(8, 4096, 384),
            (
                Target('official ops', 'forward'),
                Target('official ops', 'step', least=3.0),
                Target('official ops', 'step', 'kept memory', least=4.0),
            ),
        ),
        BackboneRow(
            1248,
            8,
            (
                Target(NAIVE, 'forward', least=2.8),
                Target(NAIVE, 'forward', 'peak memory', least=1 / 0.132),
                Target(SDPA, 'forward', least=0.8, goal=1.3),
                Target(SDPA, 'forward', 'peak memory'),
            ),
        ),
        BackboneRow(
            2048,
            4,
            (
                Target(NAIVE, 'forward'),
                Target(NAIVE, 'forward', 'peak memory'),
                Target(SDPA, 'forward', goal=2.0),
                Target(SDPA, 'forward', 'peak memory'),
            ),
        ),
    ],
    'cpu': [
        BackboneRow(
            1248,
            1,
            (
                Target(SDPA, 'forward', least=1.8, goal=2.8),
                Target(SDPA, 'forward', 'peak memory', least=1.0, goal=2.0),
            ),
        ),
        BackboneRow(
            512,
            1,
            (Target('vim-tiny:reference', 'step', least=3.0, goal=5.0),),
            'vim-tiny:auto',
        ),
    ],
}
FIELDS = {'time': 'median_ms', 'peak memory': 'peak_mib', 'kept memory': 'kept_mib'}


def judge(row: OpRow | BackboneRow, measured: list[dict]) -> Iterator[dict]:
    """For each target of a row: both numbers, their ratio, and whether it is reached."""
    found = {(m['label'], m['kind']): m for m in measured}
    for target in row.targets:
        ours, peer = (found[label, target.kind] for label in (ops.OURS, target.peer))
        field = FIELDS[target.what]
        missing = next((m['status'] for m in (ours, peer) if m[field] is None), None)
        value = None if missing else peer[field] / ours[field]
        yield dict(
            row=str(row),
            **vars(target),
            ours=ours[field],
            theirs=peer[field],
            unit=field.rpartition('_')[2].replace('mib', 'MiB'),
            value=value,
            status=missing or 'ok',
            reached=None if value is None or target.least is None else value >= target.least,
            measured=[ours, peer],
        )


def pair_cell(row):
    if row['value'] is None:
        return row['status']
    return f'{common.number(row["ours"])} / {common.number(row["theirs"])} {row["unit"]}'


def target_cell(row):
    bounds = {'at least': row['least'], 'goal': row['goal']}
    return ', '.join(f'{name} {common.number(x)}' for name, x in bounds.items() if x is not None)


COLUMNS = {
    'row': lambda row: row['row'],
    'pass': lambda row: row['kind'],
    'peer': lambda row: row['peer'],
    'what': lambda row: row['what'],
    'ours / peer': pair_cell,
    '× less': lambda row: common.number(row['value']),
    'target': target_cell,
    'reached': lambda row: {None: '', True: 'yes', False: 'no'}[row['reached']],
}


def main() -> int:
    parser = common.parser(MODULE, __doc__, minutes=4)
    parser.add_argument(
        '--precision', choices=PRECISIONS, help='of the backbones; see benchmarks.backbones'
    )
    parser.add_argument('--list', action='store_true', help='print the rows, measure nothing')
    args = parser.parse_args()
    if args.list:
        for row in ROWS[args.device]:
            for target in row.targets:
                cell = target_cell(vars(target)) or 'reported'
                print(f'{row}, {target.kind}, {target.what} beside {target.peer}: {cell}')
        return 0
    device = common.start(args)
    args.precision = args.precision or backbones.DEFAULTS[device.type]['precision']
    report = common.Report(MODULE, device, args)
    deadline = Deadline(args.minutes)
    report.table(f'Reach; backbones in {args.precision}', COLUMNS)
    for row in ROWS[device.type]:
        reason = deadline.reason()
        try:
            measured = [] if reason else row.measure(device, args)
        except Exception as error:
            reason = explain(error)
        for found in judge(row, measured) if not reason else unmeasured(row, reason):
            report.add(found)
    return 0


def unmeasured(row: OpRow | BackboneRow, reason: str) -> Iterator[dict]:
    blank = dict.fromkeys(('ours', 'theirs', 'unit', 'value', 'reached'))
    for target in row.targets:
        yield dict(row=str(row), **vars(target), **blank, status=reason, measured=[])


if __name__ == '__main__':
    sys.exit(main())
