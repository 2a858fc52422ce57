"""Medians of several contestants that run in turn, on a CPU or a GPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH = 2**28  # bytes written between two runs: several times the L2 of any GPU


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> 'Timing':
        quantiles = torch.tensor(samples, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        )
        return cls(*quantiles.tolist(), len(samples))

    def times(self, count: int) -> 'Timing':
        """Of so many runs, one after the other."""
        return Timing(count * self.median, count * self.low, count * self.high, self.runs)


def explain(error: Exception) -> str:
    """Why a contestant has no number, in a line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ['']
    what = f'{type(error).__name__}: {lines[0].strip()[:160]}'
    if isinstance(error, ImportError):
        return f'not installed: {error.name or lines[0]}'
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return 'out of memory'
    if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
        return f'not available: {what}'
    return f'failed: {what}'


class Stopwatch:
    """Times calls on a device; on a GPU by events, each call after its L2 was overwritten."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == 'cuda':
            self.flush = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> Callable[[], float]:
        """Runs `call`; the result tells its milliseconds, on a GPU after a `synchronize`."""
        if self.device.type != 'cuda':
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e3
            return lambda: elapsed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    def synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def now(self, call: Callable[[], object]) -> float:
        """Milliseconds of a single run."""
        lap = self(call)
        self.synchronize()
        return lap()


def alternate(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    runs: tuple[int, int] = (3, 200),
) -> dict[str, Timing | str]:
    """Times contestants in turn, so that what disturbs one disturbs all.

    Each runs twice first: that compiles what has to be and touches the memory that it needs at
    this size. Contestants slower than others get fewer runs, spread evenly over theirs.

    Args:
        calls: {name: what to time}.
        device: Where they run.
        seconds: Roughly how long to measure each.
        runs: The fewest and the most for each, whatever `seconds` says.

    Returns:
        {name: timing}, or the reason why there is none.
    """
    stopwatch = Stopwatch(device)
    outcomes: dict[str, Timing | str] = {}
    turns = []
    for name, call in calls.items():
        try:
            call()
            count = int(1e3 * seconds / max(stopwatch.now(call), 1e-6))
        except Exception as error:
            outcomes[name] = explain(error)
            _release(device)
            continue
        count = min(max(count, runs[0]), runs[1])
        turns += [((i + 0.5) / count, name) for i in range(count)]
    laps: dict[str, list[Callable[[], float]]] = {}
    for _, name in sorted(turns):
        if name in outcomes:
            continue
        try:
            laps.setdefault(name, []).append(stopwatch(calls[name]))
        except Exception as error:
            outcomes[name] = explain(error)
            _release(device)
    stopwatch.synchronize()
    for name, own in laps.items():
        if name not in outcomes:
            outcomes[name] = Timing.of([lap() for lap in own])
    return {name: outcomes[name] for name in calls}


def _release(device):
    if device.type == 'cuda':
        torch.cuda.empty_cache()


class Deadline:
    """A number of minutes after which nothing new is begun."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.end = time.monotonic() + 60 * minutes

    def reason(self) -> str | None:
        """Why not to begin another measurement, or None."""
        if time.monotonic() < self.end:
            return None
        return f'not run: {self.minutes:g} minutes were over'
