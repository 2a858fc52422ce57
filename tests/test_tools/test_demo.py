"""tools/demo.py: what it draws, and how it runs and ends."""

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pycocotools import mask as coco_mask

TOOLS = Path(__file__).parents[2] / 'tools'
NUM_IMAGES = {'train': 24, 'val': 12}


@pytest.fixture
def modules(monkeypatch):
    """demo and _drawing, which lie in no package."""
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module('demo'), importlib.import_module('_drawing')
    del sys.modules['demo'], sys.modules['_drawing']


@pytest.fixture
def demo(modules, monkeypatch):
    monkeypatch.setattr(modules[0], 'NUM_IMAGES', NUM_IMAGES)
    return modules[0]


@pytest.fixture
def drawing(modules):
    return modules[1]


# --- data ----------------------------------------------------------------------------------------


def draw(drawing, root):
    for seed, (split, count) in enumerate(NUM_IMAGES.items()):
        drawing.draw_split(root, split, count, seed)
    return root


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*.*')}


def test_same_files_each_time(drawing, tmp_path):
    first = files(draw(drawing, tmp_path / 'first'))
    assert len(first) == 2 * sum(NUM_IMAGES.values()) + len(NUM_IMAGES)
    assert files(draw(drawing, tmp_path / 'second')) == first
    assert files(draw(drawing, tmp_path / 'first')) == first


def test_splits_differ(drawing, tmp_path):
    pictures = [path.read_bytes() for path in draw(drawing, tmp_path).glob('images/*/*.png')]
    assert len(set(pictures)) == sum(NUM_IMAGES.values())


@pytest.mark.parametrize('split', NUM_IMAGES)
def test_label_maps_and_instances_are_the_same_scenes(drawing, tmp_path, split):
    draw(drawing, tmp_path)
    data = json.loads((tmp_path / f'{split}.json').read_text())
    assert len(data['images']) == NUM_IMAGES[split]
    maps = {}
    for image in data['images']:
        path = tmp_path / 'annotations' / split / image['file_name']
        maps[image['id']] = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert maps[image['id']].shape == (image['height'], image['width'])
    covered = {number: np.zeros_like(labels) for number, labels in maps.items()}
    for entry in data['annotations']:
        mask = coco_mask.decode(entry['segmentation']).astype(bool)
        assert (maps[entry['image_id']][mask] == entry['category_id']).all()
        assert entry['area'] == mask.sum() > 0
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert entry['bbox'] == [left, top, np.ptp(columns) + 1, np.ptp(rows) + 1]
        covered[entry['image_id']] += mask
    for number, labels in maps.items():
        np.testing.assert_array_equal(covered[number], labels > 0)


def test_shapes_cover_a_quarter_in_the_hues_of_their_classes(drawing):
    random = np.random.default_rng(0)
    coverage = []
    for _ in range(100):
        picture, instances = drawing.draw_scene(random)
        hues = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)[..., 0].astype(int)
        for label, mask in instances:
            off = abs(hues[mask] - drawing.HUES[label - 1])
            assert off.max() <= drawing.HUE_SPREAD + 2  # rounding to 8 bits
        coverage.append(sum(mask.sum() for _, mask in instances) / hues.size)
    assert np.mean(coverage) == pytest.approx(0.25, abs=0.03)
    assert max(coverage) - min(coverage) > 0.2


def test_configs_have_the_classes(demo, drawing):
    classes = {
        job.folder: Config.fromfile(demo.CONFIGS / job.config).metainfo.classes
        for job in demo.JOBS
    }
    assert classes['detection'] == tuple(drawing.NAMES)
    assert classes['segmentation'] == ('background', *drawing.NAMES)


@pytest.mark.parametrize('split', NUM_IMAGES)
def test_mmdet_reads_all_of_it(demo, drawing, tmp_path, monkeypatch, split):
    monkeypatch.setenv('SHAPES_ROOT', str(draw(drawing, tmp_path)))
    init_default_scope('mmdet')
    cfg = Config.fromfile(demo.CONFIGS / demo.DETECTION.config)
    dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    assert len(dataset) == NUM_IMAGES[split]
    data = json.loads((tmp_path / f'{split}.json').read_text())
    samples = [dataset[i]['data_samples'].gt_instances for i in range(len(dataset))]
    assert sum(map(len, samples)) == len(data['annotations'])
    areas = [area for sample in samples for area in sample.masks.areas]
    assert areas == [entry['area'] for entry in data['annotations']]


# --- the demo, with scripts in place of training and testing -------------------------------------

PRELUDE = """
import json, os, pathlib, pickle, subprocess, sys, time
work_dir = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
detection = work_dir.name == 'detection'
"""
TRAIN = """
work_dir.mkdir(parents=True, exist_ok=True)
assert os.environ['OMP_NUM_THREADS'] == '1'
print('Iter(train) [ 20/300]  lr: 1e-3  eta: 0:01:02  time: 0.5  loss: 1.5  loss_cls: 0.5')
(work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_300.pth'))
"""
TEST = """
assert sys.argv[2].endswith('iter_300.pth')
out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])
data = pathlib.Path(os.environ['SHAPES_ROOT'])
if detection:
    nothing = {'pred_instances': dict(scores=[], labels=[], masks=[])}
    out.write_bytes(pickle.dumps([nothing] * len(list(data.glob('images/val/*')))))
else:
    out.mkdir(exist_ok=True)
    for path in data.glob('annotations/val/*'):
        (out / path.name).write_bytes(path.read_bytes())
metrics = {'coco/bbox_mAP_50': 0.61} if detection else {'mIoU': 72.0}
folder = work_dir / str(time.time_ns())
folder.mkdir()
(folder / f'{folder.name}.json').write_text(json.dumps(metrics))
"""


@pytest.fixture
def scripts(demo, tmp_path, monkeypatch):
    """A function that puts scripts in the place of train.py and test.py."""
    folder = tmp_path / 'some tools'
    folder.mkdir()
    monkeypatch.setattr(demo, 'TOOLS', folder)

    def write(train=TRAIN, test=TEST):
        (folder / 'train.py').write_text(PRELUDE + textwrap.dedent(train))
        (folder / 'test.py').write_text(PRELUDE + textwrap.dedent(test))

    write()
    return write


@pytest.fixture
def run(demo, tmp_path):
    """The demo in this process, in a folder with a space in its name."""
    return lambda *arguments: demo.main(['--work-dir', str(tmp_path / 'a demo'), *arguments])


def test_prints_and_draws(run, scripts, tmp_path, capsys):
    run()
    output = capsys.readouterr().out
    assert '[Vim + UperNet]       train  20/300  eta 0:01:02  loss 1.5\n' in output
    assert 'mIoU      0.720  (expected: 0.7 or more)' in output
    assert 'box AP50  0.610  (expected: 0.5 or more)' in output
    sheet = cv2.imread(str(tmp_path / 'a demo' / 'predictions.png'))
    assert sheet.shape[1] == 4 * 3 * 128


@pytest.mark.parametrize(
    'good, bad, complaint',
    [
        ('0.61', '0.49', r'^box AP50 is 0\.490, but 0\.5 or more was expected\.$'),
        ('72.0', 'float("nan")', r'^mIoU is nan, but 0\.7 or more was expected\.$'),
        ("'coco/bbox_mAP_50': 0.61", '', r'^box AP50 is 0\.000, but 0\.5 or more was expected\.$'),
    ],
)
def test_bad_values_fail(run, scripts, tmp_path, good, bad, complaint):
    """Those of this run, even after a better one; the pictures are there all the same."""
    run()
    sheet = tmp_path / 'a demo' / 'predictions.png'
    sheet.unlink()
    scripts(test=TEST.replace(good, bad))
    with pytest.raises(SystemExit, match=complaint):
        run()
    assert sheet.is_file()


#: A script of many seconds that starts another one, as a data loader would.
ENDLESS = """
    work_dir.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    (work_dir / 'begun').write_text(f'{os.getpid()} {child.pid}')
    time.sleep(60)
"""


def alive(pid):
    """Whether it still runs; a zombie does not."""
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != 'Z'


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_failure_of_one_stops_the_other(run, scripts, tmp_path):
    begun = tmp_path / 'a demo' / 'segmentation' / 'begun'
    scripts(
        train=f"""
    if detection:
        while not pathlib.Path({str(begun)!r}).exists():
            time.sleep(0.05)
        sys.exit('No rule for this shape.')
    {ENDLESS}"""
    )
    with pytest.raises(SystemExit) as ended:
        run()
    assert 'No rule for this shape.' in ended.value.code
    assert 'SecViT + Mask R-CNN failed' in ended.value.code
    assert str(tmp_path / 'a demo' / 'detection.log') in ended.value.code
    wait_until(lambda: not any(map(alive, begun.read_text().split())))


RUN = """
import signal, sys
from pathlib import Path
import demo
# A parent that ignores it would have passed that on.
signal.signal(int(sys.argv[3]), signal.default_int_handler)
demo.TOOLS = Path(sys.argv[1])
demo.NUM_IMAGES = {'train': 1, 'val': 1}
demo.main(['--work-dir', sys.argv[2]])
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_process_behind(scripts, tmp_path, number):
    scripts(train=ENDLESS)
    work_dir = tmp_path / 'a demo'
    process = subprocess.Popen(
        [sys.executable, '-c', RUN, tmp_path / 'some tools', work_dir, str(int(number))],
        env={**os.environ, 'PYTHONPATH': str(TOOLS)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len([p for p in work_dir.glob('*/begun') if p.read_text()]) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors == 'Stopped.\n'
    started = ' '.join(path.read_text() for path in work_dir.glob('*/begun')).split()
    assert len(started) == 4
    wait_until(lambda: not any(map(alive, started)))


# --- the demo ------------------------------------------------------------------------------------


def test_whole_path(run, tmp_path, capsys):
    """Two iterations teach nothing, and that is what it says."""
    with pytest.raises(SystemExit, match=r'^mIoU is .*, but 0\.7 or more'):
        run('--iterations', '2')
    work_dir = tmp_path / 'a demo'
    assert sorted(path.name for path in work_dir.glob('*/*.pth')) == ['iter_2.pth'] * 2
    found = pickle.loads((work_dir / 'detection' / 'predictions.pkl').read_bytes())
    assert len(found) == NUM_IMAGES['val']
    assert len(list((work_dir / 'segmentation' / 'predictions').iterdir())) == NUM_IMAGES['val']
    assert (work_dir / 'predictions.png').is_file()
    assert 'box AP50' in capsys.readouterr().out
