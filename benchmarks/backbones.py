"""Vim, ViL and SecViT beside DeiT and others: images per second, peak memory."""

import math
import sys
from collections.abc import Iterator

import torch

from benchmarks import common, memory
from benchmarks.common import Size
from benchmarks.models import PLAIN, PRECISIONS, RECOMPUTE, Runner
from benchmarks.timing import Deadline, Stopwatch, Timing, alternate, explain

MODULE = 'benchmarks.backbones'
MODELS = ['vim-tiny', 'vil-tiny', 'deit-tiny:sdpa', 'deit-tiny:naive', 'secvit-tiny']
DEFAULTS = {
    'cuda': dict(
        models=[
            *(*MODELS, 'vim-small', 'vil-small', 'deit-small:sdpa', 'deit-small:naive'),
            *('secvit-small', 'swin-tiny', 'vitdet-deit-small'),
        ],
        sizes=[224, 512, 1024, 1248, 2048],
        batches=['1', 'max'],
        precision='bfloat16',
        recompute=1024,
        recompute_batch=8,
    ),
    'cpu': dict(
        models=MODELS,
        sizes=[224, 512, 1024],
        batches=['1'],
        precision='float32',
        recompute=512,
        recompute_batch=1,
    ),
}


def peak(runner: Runner, size: Size, batch: int, kind: str, threads: int) -> float:
    """MiB that image and pass add; on a CPU in a process of its own."""
    if runner.device.type == 'cpu':
        step = kind == 'step'
        return memory.process_peak(runner.label, size, batch, step, threads, runner.precision)
    call = runner.pass_(kind)
    call(runner.image(size, batch))  # libraries may look for their best kernel, with its memory
    return memory.cuda_peak(lambda: call(runner.image(size, batch)), runner.device)


def compare(
    runners: list[Runner], size: Size, batch: int, kind: str, seconds: float, threads: int
) -> list[dict]:
    """A row for each model, all on images of one size, timed in turn.

    Args:
        kind: 'forward' or 'step', a forward and backward pass.
    """
    device = runners[0].device
    reasons = {r.label: reason for r in runners if (reason := r.obstacle(size, batch, kind))}
    runnable = [r for r in runners if r.label not in reasons]
    peaks = {}
    for runner in runnable:
        try:
            peaks[runner.label] = peak(runner, size, batch, kind, threads)
        except Exception as error:
            reasons[runner.label] = explain(error)
        if device.type == 'cuda':
            torch.cuda.empty_cache()
    images = {r.label: r.image(size, batch) for r in runnable if r.label in peaks}
    calls = {
        r.label: lambda r=r: r.pass_(kind)(images[r.label]) for r in runnable if r.label in peaks
    }
    outcomes = {**alternate(calls, device, seconds), **reasons}
    for runner in runners:
        if isinstance(outcomes[runner.label], Timing):
            outcomes[runner.label] = outcomes[runner.label].times(runner.repeats)
    first = outcomes[runners[0].label]
    rows = []
    for runner in runners:
        outcome = outcomes[runner.label]
        timed = isinstance(outcome, Timing)
        rows.append(
            dict(
                model=runner.label,
                size=size,
                batch=batch,
                kind=kind,
                dtype=str(runner.dtype).removeprefix('torch.'),
                autocast=runner.autocast,
                backend=common.backend_name(runner.backend) if runner.ours else None,
                **common.timing_fields(outcome, getattr(first, 'median', None)),
                images_per_second=1e3 * batch / outcome.median if timed else None,
                peak_mib=peaks.get(runner.label),
            )
        )
    return rows


def largest_batch(
    runner: Runner, size: int, kind: str, most: int, slowest: float
) -> tuple[int, str]:
    """The largest power of two that fits, and what ended the search.

    Args:
        most: Batch beyond which not to look.
        slowest: Seconds of one run beyond which not to look.
    """
    stopwatch = Stopwatch(runner.device)
    batch = 0
    while batch < most:
        larger = max(1, 2 * batch)
        try:
            elapsed = stopwatch.now(lambda n=larger: runner.pass_(kind)(runner.image(size, n)))
        except torch.OutOfMemoryError:
            return batch, 'memory'
        finally:
            torch.cuda.empty_cache()
        batch = larger
        if elapsed > 1e3 * slowest:
            return batch, f'{slowest:g} s a run'
    return batch, f'limit of {most}'


def crossings(rows: list[dict], ours: str, peer: str, kind: str) -> dict[str, str]:
    """At which size of square images `ours` passes `peer`, in time and in memory, at batch 1.

    Between two sizes the ratio is taken as a power of the size.
    """
    found = {}
    for what, field in (('time', 'median_ms'), ('memory', 'peak_mib')):
        values = {
            name: {
                r['size']: r[field]
                for r in rows
                if (r['model'], r['kind'], r['batch']) == (name, kind, 1) and r[field]
                if isinstance(r['size'], int)
            }
            for name in (ours, peer)
        }
        sizes = sorted(set(values[ours]) & set(values[peer]))
        logs = [math.log(values[ours][s] / values[peer][s]) for s in sizes]
        if not sizes:
            found[what] = 'at no size measured for both'
        elif logs[-1] > 0:
            found[what] = f'at no size up to {sizes[-1]} px'
        elif max(logs) <= 0:
            found[what] = f'at every size from {sizes[0]} px'
        else:
            i = max(i for i, x in enumerate(logs) if x > 0)
            share = logs[i] / (logs[i] - logs[i + 1])
            crossing = sizes[i] * (sizes[i + 1] / sizes[i]) ** share
            found[what] = f'from about {crossing:.0f} px ({sizes[i]}–{sizes[i + 1]} measured)'
    return found


def pairs(labels: list[str]) -> Iterator[tuple[str, str]]:
    """Each Vim and ViL with each DeiT of its size."""
    for ours in labels:
        for peer in labels:
            family, _, arch = ours.partition(':')[0].rpartition('-')
            if family in PLAIN and peer.startswith(f'deit-{arch}'):
                yield ours, peer


def recompute_labels(label: str) -> list[str]:
    """A model of ours at each level of recomputation."""
    kept = [part for part in label.split(':') if part not in RECOMPUTE]
    return [':'.join([*kept, level]) for level in RECOMPUTE]


COLUMNS = {
    'pixels': lambda row: common.size_name(row['size']),
    'batch': lambda row: str(row['batch']) + (f' ({row["limit"]})' if row['limit'] else ''),
    'pass': lambda row: row['kind'],
    'model': lambda row: row['model'],
    'ms (20–80 %)': common.timing_cell,
    'images/s': lambda row: common.number(row['images_per_second']),
    '× first': lambda row: common.number(row['ratio']),
    'peak MiB': lambda row: common.number(row['peak_mib']),
}


def main() -> int:
    parser = common.parser(MODULE, __doc__, minutes=5)
    add = parser.add_argument
    add('--models', nargs='+', help='FAMILY-ARCH[:OPTION…]: vil-tiny:reference, deit-tiny:naive')
    add('--sizes', nargs='*', type=common.parse_size, help='pixels: N or HxW, multiples of 16')
    add('--batches', nargs='+', help="numbers, or 'max': the largest power of two (GPU)")
    add('--passes', nargs='+', default=['forward', 'step'], choices=['forward', 'step'], help=' ')
    add('--precision', choices=PRECISIONS, help="'bfloat16' casts the weights, no autocast")
    add('--recompute', type=int, metavar='SIZE', help='of the recomputation table; 0: none')
    add('--recompute-batch', type=int, metavar='N', help='of the recomputation table')
    add('--most', type=int, default=256, help="where the search for 'max' ends")
    add('--slowest', type=float, default=1.0, help="seconds of a run where it ends, for 'max'")
    args = parser.parse_args()
    device = common.start(args)
    for name, value in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if device.type == 'cpu' and 'max' in args.batches:
        parser.error("--batches max is for a GPU: on a CPU it would take the machine's memory")
    runners = {label: Runner(label, device, args.precision) for label in args.models}
    report = common.Report(MODULE, device, args)
    deadline = Deadline(args.minutes)

    def measure(table, group, size, batch, kind, limit=None):
        for row in compare(group, size, batch, kind, args.seconds, args.threads):
            report.add(dict(row, table=table, limit=limit))

    def begin(what):
        reason = deadline.reason()
        if reason:
            report.say(f'{what}: {reason}')
            report.data.setdefault('skipped', []).append(f'{what}: {reason}')
        return not reason

    # The rows of most interest first, should the time run out.
    if args.recompute:
        report.table(f'Recomputation, {args.precision}', COLUMNS)
        for label in (label for label, runner in runners.items() if runner.ours):
            if begin(f'recomputation of {label}'):
                group = [Runner(x, device, args.precision) for x in recompute_labels(label)]
                measure('recompute', group, args.recompute, args.recompute_batch, 'step')
    if args.sizes:
        report.table(f'Backbones, {args.precision}', COLUMNS)
    for batch in args.batches:
        for size in args.sizes:
            for kind in args.passes:
                if not begin(f'{kind} at {common.size_name(size)} px, batch {batch}'):
                    continue
                if batch != 'max':
                    measure('backbones', list(runners.values()), size, int(batch), kind)
                    continue
                for runner in runners.values():
                    try:
                        found, limit = largest_batch(runner, size, kind, args.most, args.slowest)
                    except Exception as error:
                        report.say(
                            f'{runner.label} at {common.size_name(size)} px: {explain(error)}'
                        )
                        continue
                    if found:
                        measure('backbones', [runner], size, found, kind, limit)
    rows = [row for row in report.data['results'] if row['table'] == 'backbones']
    for kind in args.passes:
        for ours, peer in pairs(args.models):
            found = crossings(rows, ours, peer, kind)
            report.note(
                f'{kind}, batch 1: {ours} passes {peer} in time {found["time"]}, '
                f'in memory {found["memory"]}.'
            )
    return 0


if __name__ == '__main__':
    sys.exit(main())
