"""tools/cluster_maps.py: what it draws, what it reads, and what it says of bad input."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import forks
import numpy as np
import pytest
import torch

from visionseq_mm.registry import MODELS

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'cluster_maps.py'
NANO = ROOT / 'configs' / 'nano'
CONFIG = NANO / 'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128.py'
LINE, GAP = 18, 6

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    monkeypatch.syspath_prepend(TOOL.parent)
    return runpy.run_path(str(TOOL))


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / 'picture.png'), pixels)
    return tmp_path / 'picture.png'


def shape(path):
    return cv2.imread(str(path)).shape[:2]


def size(heights, columns, cell):
    """Of a drawing: (rows, columns) of pixels."""
    return sum(heights) + (len(heights) + 3) * LINE, columns * (cell + GAP)


@pytest.mark.slow
def test_as_a_process(picture, tmp_path):
    out = tmp_path / 'new' / 'maps.png'
    done = subprocess.run(
        [sys.executable, TOOL, 'sec-swin-tiny', picture, '--stages', '1', '--out', out],
        env={**os.environ, 'VISIONSEQ_BACKEND': 'reference'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'The weights are random' in done.stderr
    # onedl-mmdetection warns on standard output when it is imported.
    assert done.stdout.splitlines()[-1 if forks.ONEDL_MMDET else 0 :] == [str(out)]
    assert shape(out) == size([180], 4, 240)


def test_two_pictures_of_a_config(script, picture, tmp_path):
    """At 96 x 64 pixels; nano's second stage has four heads."""
    out = tmp_path / 'maps.png'
    arguments = [CONFIG, picture, picture, '--stages', '2', '--size', '96', '64', '--cell', '50']
    script['main']([*map(str, arguments), '--out', str(out)])
    assert shape(out) == size([75] * 2, 5, 50)


def test_shorter_side(script, picture):
    assert script['read_picture'](picture, [24]).shape == (24, 32, 3)
    assert script['read_picture'](picture, [24, 80]).shape == (24, 80, 3)
    assert script['read_picture'](picture, []).shape == (48, 64, 3)


@pytest.mark.parametrize('alpha', [1.0, 0.25])
def test_colours(script, alpha, tmp_path):
    """4 x 4 pixels of the picture are one token, and 8 x 8 of the drawing; it ends within one."""
    grey, labels = 80, np.arange(6).reshape(2, 3)
    picture = np.full((8, 10, 3), grey, np.uint8)
    figure = script['draw']([(picture, 1, {0: labels, 2: labels[::-1]})], 'title', alpha, 20)
    figure.savefig(tmp_path / 'maps.png')
    pixels = cv2.imread(str(tmp_path / 'maps.png'))[..., ::-1].astype(float)
    assert pixels.shape[:2] == size([16], 3, 20)
    top = 2 * LINE
    assert (pixels[top + 1 : top + 15, 1:19] == grey).all()
    for column, panel in enumerate((labels, labels[::-1]), start=1):
        left = column * (20 + GAP)
        for (i, j), label in np.ndenumerate(panel):
            colour = 255 * np.array(script['COLOURS'](label / 5)[:3])
            found = pixels[top + 8 * i + 3, left + min(8 * j + 3, 18)]
            assert found == pytest.approx(alpha * colour + (1 - alpha) * grey, abs=2)


def test_neighbouring_clusters_have_neighbouring_colours(script):
    colours = script['COLOURS'](np.linspace(0, 1, 32))[:, :3]
    apart = np.linalg.norm(colours[:, None] - colours, axis=2)
    np.fill_diagonal(apart, np.inf)
    nearest = apart.argmin(1)
    assert (abs(nearest - np.arange(32)) == 1).all()
    assert apart.min() > 0.03


@pytest.mark.parametrize('whole', [True, False])
def test_checkpoint(script, whole, tmp_path, capsys):
    """Of the whole model or the backbone alone; not the random weights."""
    config, normalisation = script['read_model'](str(CONFIG))
    assert normalisation['bgr_to_rgb'] and normalisation['mean'] == [123.675, 116.28, 103.53]
    torch.manual_seed(1)
    trained = MODELS.build(config).state_dict()
    prefix = 'backbone.' if whole else ''
    weights = {prefix + name: tensor for name, tensor in trained.items()}
    if whole:
        weights['rpn_head.weight'] = torch.ones(1)
    torch.save(dict(state_dict=weights), tmp_path / 'trained.pth')
    found = script['build_backbone'](config, str(tmp_path / 'trained.pth')).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    assert 'random' not in capsys.readouterr().err


def refusal(script, capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        script['main']([str(argument) for argument in arguments])
    return f'{error.value}{capsys.readouterr().err}'


def test_refusals(script, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.png').write_text('text')
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'other.pth')
    vim = NANO / 'upernet_vim-nano_1xb8-300_shapes-128x128.py'
    for arguments, expected in (
        (('secvit-tiny', 'none.png'), 'no picture none.png'),
        (('secvit-tiny', 'text.png'), 'text.png is not a picture'),
        (('secvit-huge', picture), 'secvit-huge is neither a config file nor one of '),
        ((vim, picture), 'Vim has no clusters; those that do: '),
        ((CONFIG, picture, '--stages', '4'), 'stage 4 of this SecViT has no clusters'),
        ((CONFIG, picture, '--block', '5'), 'blocks of stage 1 are numbered from -1 to 0, got 5'),
        ((CONFIG, picture, '--heads', '1', '2'), 'Stage 1 has heads from 0 to 1, got --heads [2]'),
        ((CONFIG, picture, '--checkpoint', 'none.pth'), '--checkpoint none.pth: '),
        ((CONFIG, picture, '--checkpoint', 'text.png'), "a text of 4 bytes that begins 'text'"),
        ((CONFIG, picture, '--checkpoint', 'other.pth'), 'does not fit the backbone SecViT'),
        ((CONFIG, picture, '--size', '0'), 'two positive numbers, got [0]'),
        ((CONFIG, picture, '--size', '3', '8', '8'), 'two positive numbers, got [3, 8, 8]'),
        ((CONFIG, picture, '--alpha', '70'), '--alpha must lie between 0 and 1, got 70.0'),
        ((CONFIG, picture, '--cell', '0'), '--cell must be positive, got 0'),
        (
            (CONFIG, picture, '--out', 'maps'),
            '--out must end in .png, .jpg, .jpeg, .pdf, got maps',
        ),
    ):
        assert expected in refusal(script, capsys, *arguments)
    assert not (tmp_path / 'cluster_maps.png').exists()
