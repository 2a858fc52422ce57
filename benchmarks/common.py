"""What the programs share: options, the choice of a backend, the report."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from visionseq_mm.ops.dispatch import ENV

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *('visionseq_mm', 'torch', 'triton', 'numpy', 'numba', 'timm'),
    *('mamba_ssm', 'causal_conv1d', 'mlstm_kernels', 'fla-core'),
)


@contextmanager
def use_backend(name: str | None):
    """Our ops run on this backend inside; None leaves the environment's choice."""
    before = os.environ.get(ENV)
    if name is not None:
        os.environ[ENV] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(ENV)
            if before is not None:
                os.environ[ENV] = before


def backend_name(name: str | None) -> str:
    """What `use_backend(name)` runs on: a name, or 'auto'."""
    return name or os.environ.get(ENV) or 'auto'


Size = int | tuple[int, int]  # of an image: a side of a square, or height and width


def sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def parse_size(text: str) -> Size:
    found = [int(side) if side.isdigit() else 0 for side in text.split('x')]
    if len(found) > 2 or min(found) < 1:
        raise argparse.ArgumentTypeError(f'expected N or HxW, got {text!r}')
    return found[0] if len(found) == 1 else tuple(found)


def size_name(size: Size) -> str:
    return f'{size}²' if isinstance(size, int) else '{}×{}'.format(*size)


# ----------------------------------------------------------------------- options


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(module: str, description: str, minutes: float) -> argparse.ArgumentParser:
    """The options of every program, with `minutes` as the default of its limit."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(
        prog=f'python -m {module}',
        description=description,
        formatter_class=_Help,
    )
    add = result.add_argument
    add('--device', default='cuda' if cuda else 'cpu', choices=('cpu', 'cuda'), help=' ')
    add('--threads', type=int, default=2, help='CPU threads')
    add('--seconds', type=float, default=0.2 if cuda else 3.0, help='for each measured row')
    add('--minutes', type=float, default=minutes, help='after which nothing new is begun')
    add('--seed', type=int, default=0, help='of the random inputs')
    add('--commit', help="to report, where git does not know it: a copy of the tree's files")
    add('--json', type=Path, metavar='FILE', help='write every number there, row by row')
    return result


def start(args: argparse.Namespace) -> torch.device:
    """Threads, seed and device as the options say."""
    torch.set_num_threads(args.threads)  # our own CPU kernels take as many
    torch.manual_seed(args.seed)
    return torch.device(args.device)


# ------------------------------------------------------------------------ report


def nvidia_smi(field: str) -> str | None:
    """One field of the first GPU, or None without the tool."""
    command = ['nvidia-smi', '--id=0', f'--query-gpu={field}', '--format=csv,noheader,nounits']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    except OSError:
        cpu = None
    return cpu[1] if cpu else platform.machine()


def _git(*arguments):
    try:
        done = subprocess.run(['git', *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(module: str, device: torch.device, args: argparse.Namespace) -> dict:
    """What a number is worth nothing without."""
    commit = args.commit or _git('rev-parse', '--short=10', 'HEAD') or 'unknown'
    if not args.commit and _git('status', '--porcelain', '--untracked-files=no'):
        commit += '-dirty'
    versions = dict(python=platform.python_version())
    versions.update({name: _version(name) for name in PACKAGES})
    versions['torch'] = torch.__version__  # names the build too
    if device.type == 'cuda':
        versions.update(cuda=torch.version.cuda, driver=nvidia_smi('driver_version'))
    return dict(
        command=' '.join(['python', '-m', module, *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec='seconds'),
        commit=commit,
        device=dict(type=device.type, name=_device_name(device), threads=args.threads),
        versions=versions,
    )


class Report:
    """Rows, printed as lines of Markdown tables as they come and written as JSON."""

    def __init__(self, module: str, device: torch.device, args: argparse.Namespace):
        self.path = args.json
        self.data = dict(environment(module, device, args), results=[])
        known = {k: v for k, v in self.data['versions'].items() if v}
        self.say(
            f'{self.data["device"]["name"]}, {args.threads} CPU threads; commit '
            f'{self.data["commit"]}; {", ".join(f"{k} {v}" for k, v in known.items())}'
        )
        self.save()

    def say(self, text: str) -> None:
        print(f'\n{text}', flush=True)

    def note(self, text: str) -> None:
        """A sentence drawn from the rows."""
        self.data.setdefault('notes', []).append(text)
        self.say(text)
        self.save()

    def table(self, title: str, columns: dict[str, Callable[[dict], str]]) -> None:
        """Begins a table; `columns` maps a heading to what makes a cell of a row."""
        self.columns = columns
        self.say(f'**{title}**\n')
        print(f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}', flush=True)

    def add(self, row: dict) -> None:
        self.data['results'].append(row)
        print(f'| {" | ".join(cell(row) for cell in self.columns.values())} |', flush=True)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + '\n')


def number(value: float | None, digits: int = 3) -> str:
    """A cell with so many significant digits; empty for None."""
    if value is None:
        return ''
    if value == 0:
        return '0'
    if not 1e-3 <= abs(value) < 1e5:
        return f'{value:.1e}'
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f'{value:.{max(digits - whole, 0)}f}'


def timing_fields(outcome, baseline=None) -> dict:
    """A row's fields from what `timing.alternate` found; the ratio is to `baseline`'s median."""
    if outcome is None or isinstance(outcome, str):
        blank = dict.fromkeys(('median_ms', 'low_ms', 'high_ms', 'runs', 'ratio'))
        return dict(status=outcome, **blank)
    return dict(
        status='ok',
        median_ms=outcome.median,
        low_ms=outcome.low,
        high_ms=outcome.high,
        runs=outcome.runs,
        ratio=None if baseline is None else outcome.median / baseline,
    )


def timing_cell(row: dict) -> str:
    """'12.3 (12.1–12.6)', or why there is no number."""
    if row['status'] != 'ok':
        return row['status']
    return f'{number(row["median_ms"])} ({number(row["low_ms"])}–{number(row["high_ms"])})'
