"""Two small models learn to see coloured shapes: in minutes, on two CPU cores, without downloads.

A Vim with UperNet learns to segment them, a SecViT with Mask R-CNN to find each one, both from
scratch and side by side. Then both are tested on pictures that they were not trained on.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from _drawing import draw_split, write_sheet

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parent / 'configs' / 'nano'
NUM_IMAGES = {'train': 400, 'val': 100}


@dataclass(frozen=True)
class Job:
    title: str
    folder: str
    config: str
    out: str  # where in the folder the test leaves its predictions
    metrics: dict  # {on screen: (key in the test's JSON, factor, what is expected at least)}


SEGMENTATION = Job(
    title='Vim + UperNet',
    folder='segmentation',
    config='upernet_vim-nano_1xb8-300_shapes-128x128.py',
    out='predictions',
    metrics={'mIoU': ('mIoU', 0.01, 0.7)},
)
DETECTION = Job(
    title='SecViT + Mask R-CNN',
    folder='detection',
    config='mask-rcnn_secvit-nano_1xb8-300_shapes-128x128.py',
    out='predictions.pkl',
    metrics={
        'box AP': ('coco/bbox_mAP', 1, None),
        'box AP50': ('coco/bbox_mAP_50', 1, 0.5),
        'mask AP': ('coco/segm_mAP', 1, None),
        'mask AP50': ('coco/segm_mAP_50', 1, None),
    },
)
JOBS = SEGMENTATION, DETECTION


# --- training and testing ------------------------------------------------------------------------

PROGRESS = re.compile(r'Iter\((\w+)\) \[\s*(\d+)/(\d+)\].* eta: (\S+)(?:.* loss: (\S+))?')


class ScriptFailed(RuntimeError):
    """With the end of its output."""


def say(job, text):
    print(f'{f"[{job.title}]":21} {text}\n', end='', flush=True)


class Scripts:
    """Scripts of tools/ that run side by side and are stopped together."""

    def __init__(self):
        self.running = set()
        self.stopped = False
        self.lock = threading.Lock()

    def start(self, command, **environment):
        with self.lock:
            if self.stopped:
                raise ScriptFailed('Stopped.')
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding='utf-8',
                errors='replace',
                start_new_session=True,  # a group of processes, to be ended as one
                env={**os.environ, **environment},
            )
            self.running.add(process)
        return process

    def end(self, process):
        """It, if it still runs, and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop(self):
        with self.lock:
            self.stopped = True
            for process in self.running:
                self.end(process)

    def call(self, job, log, *command):
        """Runs a script: all of its output to ``log``, progress on screen.

        ScriptFailed if it does. However this ends, nothing that the script started goes on.
        """
        command = [str(part) for part in command]
        say(job, shlex.join(['python', *command]))
        process = self.start(
            command,
            SHAPES_ROOT=str(log.parent / 'data'),
            OMP_NUM_THREADS='1',  # two trainings on two cores would only hinder each other
        )
        try:
            with log.open('a', buffering=1) as file:
                for line in process.stdout:
                    file.write(line)
                    if found := PROGRESS.search(line):
                        mode, done, total, eta, loss = found.groups()
                        loss = f'  loss {loss}' if loss else ''
                        say(job, f'{mode:5} {done:>3}/{total}  eta {eta}{loss}')
            if process.wait():
                end = '\n'.join(log.read_text().splitlines()[-15:])
                raise ScriptFailed(f'{end}\n\n{job.title} failed. All of its output: {log}')
        finally:
            self.end(process)
            with self.lock:
                self.running.discard(process)
            process.stdout.close()
            process.wait()


def train_and_test(job, args, scripts):
    """{metric: value} and the minutes it took."""
    start = time.monotonic()
    folder, log = args.work_dir / job.folder, args.work_dir / f'{job.folder}.log'
    config = os.path.relpath(CONFIGS / job.config)
    train, test = (os.path.relpath(TOOLS / name) for name in ('train.py', 'test.py'))
    options = [f'randomness.seed={args.seed}']
    if args.iterations:
        options.append(f'train_cfg.max_iters={args.iterations}')
    log.write_text('')
    scripts.call(job, log, train, config, '--work-dir', folder, '--cfg-options', *options)
    checkpoint = os.path.relpath((folder / 'last_checkpoint').read_text())
    out = '--work-dir', folder, '--out', folder / job.out
    scripts.call(job, log, test, config, checkpoint, *out)
    # One for each test in this folder, named by the time.
    measured = json.loads(max(folder.glob('*/*.json')).read_text())
    # mmdet leaves out what it cannot measure where nothing at all was found.
    values = {
        name: factor * measured.get(key, 0) for name, (key, factor, _) in job.metrics.items()
    }
    return values, (time.monotonic() - start) / 60


def side_by_side(args):
    """The results of all jobs. When one fails, or a signal comes, none goes on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores
            signal.signal(number, signal.default_int_handler)
    scripts = Scripts()
    with ThreadPoolExecutor(len(JOBS)) as pool:
        try:
            futures = [pool.submit(train_and_test, job, args, scripts) for job in JOBS]
            for future in as_completed(futures):
                future.result()  # raises at once what the first of them raised
            return [future.result() for future in futures]
        finally:
            scripts.stop()


# --- results -------------------------------------------------------------------------------------


def report(results):
    """Prints all values; returns what is wrong with them."""
    missed = []
    for job, (values, minutes) in zip(JOBS, results, strict=True):
        print(f'\n{job.title}: {minutes:.1f} minutes')
        for name, value in values.items():
            least = job.metrics[name][2]
            print(f'  {name:9} {value:.3f}' + (f'  (expected: {least} or more)' if least else ''))
            if least and not value >= least:  # NaN, too
                missed.append(f'{name} is {value:.3f}, but {least} or more was expected.')
    return missed


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/demo'),
        help='folder for data, logs, checkpoints and pictures; files of an earlier run are '
        'overwritten (default: %(default)s)',
    )
    parser.add_argument('--iterations', type=int, help="of each training (default: the configs')")
    parser.add_argument('--seed', type=int, default=0, help='of the trainings, not of the data')
    args = parser.parse_args(arguments)
    for seed, (split, count) in enumerate(NUM_IMAGES.items()):
        draw_split(args.work_dir / 'data', split, count, seed)
    print(f'Drew {NUM_IMAGES} pictures in {args.work_dir / "data"}')
    try:
        results = side_by_side(args)
    except KeyboardInterrupt:
        sys.exit('Stopped.')
    except ScriptFailed as error:
        sys.exit(str(error))
    missed = report(results)
    sheet = args.work_dir / 'predictions.png'
    predictions = [args.work_dir / job.folder / job.out for job in JOBS]
    write_sheet(sheet, args.work_dir / 'data', 'val', *predictions, [job.title for job in JOBS])
    print(f'\nPictures, truth and predictions: {sheet}')
    if missed:
        sys.exit('\n'.join(missed))


if __name__ == '__main__':
    main()
