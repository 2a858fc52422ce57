"""Fresh processes find the stand-in, or a compiled mmcv, without our help."""

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path

import mmcv
import pytest

from visionseq_mm.compat import autoload

STAND_IN = str(Path(autoload.__file__).with_name('mmcv_ext.py'))
without_compiled = pytest.mark.skipif(
    PathFinder.find_spec('mmcv._ext', mmcv.__path__) is not None, reason='mmcv is compiled'
)


def python(*args, **environment):
    """Output of a fresh interpreter; its errors too."""
    done = subprocess.run(
        [sys.executable, *args],
        env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '1', **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.stdout


def test_entry_point_is_installed():
    points = [p for p in entry_points(group='torch.backends') if p.name == 'visionseq_mm']
    assert points, 'visionseq_mm is not installed: run `make setup`, or `pip install -e .`'
    assert all(point.load() is autoload.install for point in points)


def test_install_only_appends_and_only_once(monkeypatch):
    first = object()
    monkeypatch.setattr(sys, 'meta_path', [first])
    autoload.install()
    autoload.install()
    assert sys.meta_path == [first, autoload.MmcvExtFinder]
    assert autoload.MmcvExtFinder.find_spec('mmcv._ext').origin == STAND_IN
    for name in ('mmcv', 'mmcv.ops', '_ext', 'mmdet._ext', 'mmcv._extra'):
        assert autoload.MmcvExtFinder.find_spec(name) is None


def test_standard_library_only():
    script = (
        'import sys; before = set(sys.modules); from visionseq_mm.compat import autoload; '
        'autoload.install(); names = {m.split(".")[0] for m in set(sys.modules) - before}; '
        'print(names - set(sys.stdlib_module_names))'
    )
    assert python('-c', script).strip() == "{'visionseq_mm'}"


@pytest.mark.parametrize('compiled', [True, False])
def test_compiled_extension_wins(compiled, tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    if compiled:
        (package / '_ext.py').touch()
    script = (
        'import sys; sys.path.insert(0, sys.argv[1]); from visionseq_mm.compat import autoload; '
        'autoload.install(); from importlib.util import find_spec; '
        'print(find_spec("mmcv._ext").origin)'
    )
    expected = str(package / '_ext.py') if compiled else STAND_IN
    assert python('-c', script, str(tmp_path)).strip() == expected


@without_compiled
def test_environment_variable_turns_it_off():
    output = python('-c', 'import mmcv.ops', TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert output.splitlines()[-1] == "ModuleNotFoundError: No module named 'mmcv._ext'", output


FRESH_PROCESSES = """
import sys
from torch.utils.data import DataLoader, Dataset

class Boxes(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import mmseg.apis
        import torch
        from mmcv.ops import nms
        boxes = torch.tensor([[0.0, 0, 4, 4]] * 2)
        return sys.modules['mmcv._ext'].__file__, len(nms(boxes, torch.rand(2), 0.5)[1])

if __name__ == '__main__':
    from mmdet.apis import DetInferencer
    found = sys.modules['mmcv._ext'].__file__
    loader = DataLoader(Boxes(), None, num_workers=1, multiprocessing_context='spawn')
    print(found, *next(iter(loader)))
"""


@without_compiled
def test_toolboxes_in_a_fresh_process_and_in_a_spawned_worker(tmp_path):
    script = tmp_path / 'fresh.py'
    script.write_text(FRESH_PROCESSES)
    output = python('-W', 'ignore', str(script))
    assert output.splitlines()[-1] == f'{STAND_IN} {STAND_IN} 1', output
