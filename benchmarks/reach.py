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
QUADRATIC = 'quadratic-tiny'
OFFICIAL_SEC = 'official-attention-tiny'
SWIN, VITDET = 'swin-tiny', 'vitdet-deit-small'
FLOOR = 'floor'


@dataclass(frozen=True)
class Target:
    """How many times ours the peer's time or memory is to be.

    Attributes:
        peer: FLOOR for what a GPU cannot do without; None for ours alone, which is to fit.
        what: 'time', 'peak memory' or 'kept memory'.
        least: None where the ratio is only to be reported.
        goal: What would be better still.
        most: The other way round, how many times the peer's ours may be; so is the goal of FLOOR.
    """

    peer: str | None
    kind: str
    what: str = 'time'
    least: float | None = None
    goal: float | None = None
    most: float | None = None

    @property
    def inverse(self) -> bool:
        return self.most is not None or self.peer == FLOOR

    def reached(self, value: float) -> bool | None:
        if self.peer is None:
            return True
        if self.most is not None:
            return value <= self.most
        return None if self.least is None else value >= self.least


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
        rows = [dict(row, label=row['contestant']) for row in rows]
        floors = [
            dict(row, label=FLOOR, median_ms=row['floor_ms'], status='not known here')
            for row in rows
            if row['label'] == ops.OURS
        ]
        return rows + floors


def named(model: str, batch: int, size: common.Size) -> str:
    return '{}, {}×3×{}×{}'.format(model, batch, *common.sides(size))


@dataclass(frozen=True)
class BackboneRow:
    size: common.Size
    batch: int
    targets: tuple[Target, ...]
    ours: str = 'vim-tiny'

    def __str__(self):
        return named(self.ours, self.batch, self.size)

    def measure(self, device, args) -> list[dict]:
        peers = [target.peer for target in self.targets if target.peer]
        runners = [Runner(x, device, args.precision) for x in dict.fromkeys([self.ours, *peers])]
        rows = []
        for kind in dict.fromkeys(target.kind for target in self.targets):
            rows += backbones.compare(
                runners, self.size, self.batch, kind, args.seconds, args.threads
            )
        return [
            dict(row, label=ops.OURS if row['model'] == self.ours else row['model'])
            for row in rows
        ]


@dataclass(frozen=True)
class GrowthRow:
    """Peak memory of a training step beside that for images of a quarter of the area."""

    size: common.Size
    most: float
    ours: str
    batch: int = 1

    def __str__(self):
        return named(self.ours, self.batch, self.size)

    @property
    def smaller(self) -> common.Size:
        """Half of each side, rounded up."""
        if isinstance(self.size, int):
            return -(-self.size // 2)
        return tuple(-(-side // 2) for side in self.size)

    @property
    def targets(self) -> tuple[Target, ...]:
        peer = f'at {common.size_name(self.smaller)}'
        return (Target(peer, 'step', 'peak memory', most=self.most),)

    def measure(self, device, args) -> list[dict]:
        runner = Runner(self.ours, device, args.precision)
        rows = []
        for label, size in ((ops.OURS, self.size), (self.targets[0].peer, self.smaller)):
            peak = backbones.peak(runner, size, self.batch, 'step', args.threads)
            rows.append(dict(label=label, kind='step', size=size, status='ok', peak_mib=peak))
        return rows


Row = OpRow | BackboneRow | GrowthRow


def scan_targets(forward: float, step: float) -> tuple[Target, ...]:
    peer = 'mamba-ssm twice'
    return Target(peer, 'forward', least=forward), Target(peer, 'step', least=step)


def around_cell(op: str, least: float) -> list[OpRow]:
    targets = Target('eager', 'forward', least=least), Target(FLOOR, 'forward', goal=1.4)
    return [OpRow(op, shape, targets) for shape in ops.VIL_SHAPES['cuda']]


def cluster_attention_rows() -> Iterator[OpRow]:
    """Of each stage: the whole beside all that others do, and attention in an order given."""
    beside = 'sort+gather+SDPA'
    for shape in ops.SEC_SHAPES['cuda']:
        whole = (
            Target(beside, 'forward', least=1.5),
            Target(beside, 'step', least=1.3),
            Target('official', 'forward', least=8.0),
            Target('official', 'step', least=8.0),
        )
        yield OpRow('cluster_attention', shape, whole)
        attention = (
            Target('gather+SDPA', 'forward'),
            Target('gather+SDPA', 'step'),
            Target(FLOOR, 'forward', goal=1.35),
            Target(FLOOR, 'step'),
        )
        yield OpRow('sec_attention', shape, attention)


#: 2.8 times faster and 86.8 % less memory are the Vim paper's, on an A100; that ViL is up to 1.69
#: times as fast as Vim is the ViL paper's, for training at 224×224.
ROWS = {
    'cuda': [
        *(
            OpRow('bidirectional_scan', ops.Shape(8, L, D), scan_targets(*least))
            for D in (384, 768)
            for L, least in ((4096, (1.5, 2.5)), (4097, (2.5, 4.0)))
        ),
        *(
            OpRow(
                'mlstm',
                shape,
                (
                    Target('mlstm-kernels', 'forward', least=2.0),
                    Target('mlstm-kernels', 'step', least=1.7),
                    Target(FLOOR, 'forward', goal=1.6),
                ),
            )
            for shape in ops.VIL_SHAPES['cuda']
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
        *around_cell('vil_pre', 4.0),
        *around_cell('vil_post', 3.0),
        OpRow(
            'sec_partition',
            ops.SEC_SHAPES['cuda'][0],
            (
                Target('two argsorts', 'forward', least=5.0),
                Target('official', 'forward'),
                Target(FLOOR, 'forward', goal=1.86),  # 60 µs
            ),
        ),
        *cluster_attention_rows(),
        BackboneRow(
            1024,
            8,
            (
                Target(VITDET, 'forward', goal=1.0),
                Target(VITDET, 'forward', 'peak memory'),
                Target(VITDET, 'step'),
                Target(VITDET, 'step', 'peak memory'),
                Target(SWIN, 'forward'),
                Target(SWIN, 'forward', 'peak memory'),
                Target(SWIN, 'step'),
                Target(SWIN, 'step', 'peak memory'),
            ),
            'secvit-small',
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
            1024,
            8,
            (
                Target('vim-tiny', 'forward'),
                Target(QUADRATIC, 'forward'),
                Target(QUADRATIC, 'forward', 'peak memory'),
            ),
            'vil-tiny',
        ),
        BackboneRow(
            1024, 4, (Target(None, 'step'), Target(None, 'step', 'peak memory')), 'vil-base'
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
        BackboneRow(
            1024,
            1,
            (
                Target(QUADRATIC, 'forward', least=15.0, goal=25.0),
                Target(QUADRATIC, 'forward', 'peak memory', least=6.0),
                Target('vim-tiny', 'forward'),
            ),
            'vil-tiny',
        ),
        GrowthRow(2048, 4.4, 'vil-tiny'),
        BackboneRow(
            1024,
            1,
            (
                Target(OFFICIAL_SEC, 'forward', least=2.5, goal=3.0),
                Target(OFFICIAL_SEC, 'forward', 'peak memory', least=4.0),
            ),
            'secvit-tiny',
        ),
        GrowthRow((800, 1333), 4.4, 'secvit-tiny'),
    ],
}
FIELDS = {'time': 'median_ms', 'peak memory': 'peak_mib', 'kept memory': 'kept_mib'}


def judge(row: Row, measured: list[dict]) -> Iterator[dict]:
    """For each target of a row: both numbers, their ratio, and whether it is reached."""
    found = {(m['label'], m['kind']): m for m in measured}
    for target in row.targets:
        labels = [ops.OURS, target.peer] if target.peer else [ops.OURS]
        of_each = [found[label, target.kind] for label in labels]
        field = FIELDS[target.what]
        missing = next((m['status'] for m in of_each if m[field] is None), None)
        ours, *theirs = (m[field] for m in of_each)
        value = None
        if theirs and not missing:
            value = ours / theirs[0] if target.inverse else theirs[0] / ours
        yield dict(
            row=str(row),
            **vars(target),
            ours=ours,
            theirs=theirs[0] if theirs else None,
            unit=field.rpartition('_')[2].replace('mib', 'MiB'),
            value=value,
            status=missing or 'ok',
            reached=None if missing else target.reached(value),
            measured=of_each,
        )


def pair_cell(row):
    if row['status'] != 'ok':
        return row['status']
    both = [common.number(x) for x in (row['ours'], row['theirs']) if x is not None]
    return f'{" / ".join(both)} {row["unit"]}'


def ratio_cell(row):
    if row['value'] is None:
        return ''
    more = row['most'] is not None or row['peer'] == FLOOR
    return f'{common.number(row["value"])} {"as much" if more else "less"}'


def target_cell(row):
    if row['peer'] is None:
        return 'fits'
    bounds = {'at least': row['least'], 'at most': row['most'], 'goal': row['goal']}
    return ', '.join(f'{name} {common.number(x)}' for name, x in bounds.items() if x is not None)


COLUMNS = {
    'row': lambda row: row['row'],
    'pass': lambda row: row['kind'],
    'peer': lambda row: row['peer'] or '',
    'what': lambda row: row['what'],
    'ours / peer': pair_cell,
    '×': ratio_cell,
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
                beside = f' beside {target.peer}' if target.peer else ''
                print(f'{row}, {target.kind}, {target.what}{beside}: {cell}')
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


def unmeasured(row: Row, reason: str) -> Iterator[dict]:
    blank = dict.fromkeys(('ours', 'theirs', 'unit', 'value', 'reached'))
    for target in row.targets:
        yield dict(row=str(row), **vars(target), **blank, status=reason, measured=[])


if __name__ == '__main__':
    sys.exit(main())
