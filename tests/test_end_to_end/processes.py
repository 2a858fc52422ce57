"""Fresh processes as a user starts them, and what they leave in their work folder."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def the_config(pattern):
    """The one config whose path under configs/ matches."""
    found = list((ROOT / 'configs').glob(pattern))
    assert len(found) == 1, f'configs/{pattern} should match one file, not {found}'
    return found[0]


def toolbox(scope, name):
    """mmdet's or mmseg's own script, in the folder that it installs for mim."""
    return Path(importlib.util.find_spec(scope).origin).parent / '.mim' / 'tools' / name


def run(*command, cwd, **environment):
    """(exit status, both outputs) of ``command``, run in ``cwd``; 'mim' is this Python's.

    On one CPU thread, so that sums are made in the same order each time.
    """
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={
            **os.environ,
            'PATH': path,
            'CUDA_VISIBLE_DEVICES': '',
            'OMP_NUM_THREADS': '1',
            'TORCH_DEVICE_BACKEND_AUTOLOAD': '1',
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def call(*command, cwd, **environment):
    """Both outputs of ``command``, which must succeed."""
    status, output = run(*command, cwd=cwd, **environment)
    assert status == 0, f'{command[:3]} ended with {status}:\n{tail(output)}'
    return output


def tail(output):
    return f'[...]\n{output[-4000:]}' if len(output) > 4000 else output


def options(*settings):
    """``--cfg-options`` of a toolbox's script, from dicts; later ones win."""
    merged = {key: value for part in settings for key, value in part.items()}
    return ['--cfg-options', *(f'{key}={value}' for key, value in merged.items())]


def log(work_dir):
    """What the training in ``work_dir`` logged: a dict for each iteration and validation."""
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(work_dir):
    """{iteration: loss} of the training in ``work_dir``."""
    return {entry['iter']: entry['loss'] for entry in log(work_dir) if 'loss' in entry}


def metrics(work_dir):
    """What the test in ``work_dir`` measured."""
    (file,) = work_dir.glob('*/*.json')
    return json.loads(file.read_text())


def last_line(output):
    """The JSON that a script printed at its end."""
    try:
        return json.loads(output.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise AssertionError(f'no JSON in the last line of:\n{tail(output)}') from None
