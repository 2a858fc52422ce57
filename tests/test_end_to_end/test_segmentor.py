"""UperNet from a foreign folder: trained, resumed, tested and asked, each in its own process."""

import math
import shutil
import sys

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from processes import call, last_line, log, losses, metrics, options, tail, the_config, toolbox
from toy_data import CAMVID_CLASSES, draw_camvid

import visionseq_mm.registry  # noqa: F401, makes mmengine's checkpoints loadable

CONFIG = the_config('nano/upernet_vim-nano*camvid*.py')
SHORT = {
    'train_cfg.max_iters': 3,
    'train_dataloader.batch_size': 2,
    'default_hooks.logger.interval': 1,
    'default_hooks.checkpoint.interval': 1,
    # No warm-up: a loss depends on the steps before.
    'param_scheduler': None,
    'randomness.seed': 0,
}


@pytest.fixture(scope='module')
def camvid(tmp_path_factory):
    return draw_camvid(tmp_path_factory.mktemp('data') / 'a few streets')


@pytest.fixture(scope='module')
def trained(place, camvid):
    """The work folder of three iterations; the data root ends in a slash."""
    call(
        *('mim', 'train', 'mmsegmentation', CONFIG, '--work-dir', 'trained', *options(SHORT)),
        cwd=place,
        CAMVID_ROOT=f'{camvid}/',
    )
    return place / 'trained'


def test_training(trained):
    assert list(losses(trained)) == [1, 2, 3]
    assert all(map(math.isfinite, losses(trained).values())), losses(trained)
    validation = log(trained)[-1]
    assert 'mIoU' in validation


def test_written_checkpoint_is_safe_to_load(trained):
    checkpoint = torch.load(trained / 'iter_2.pth', weights_only=True)
    history = checkpoint['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert len(history.data[0]) == 2


def test_resuming(trained, camvid, place):
    """After two of three iterations, with the third loss of the training that went on."""
    resumed = place / 'resumed'
    resumed.mkdir()
    checkpoint = shutil.copy(trained / 'iter_2.pth', resumed)
    (resumed / 'last_checkpoint').write_text(str(checkpoint))
    output = call(
        *(sys.executable, toolbox('mmseg', 'train.py'), CONFIG, '--work-dir', 'resumed'),
        *('--resume', *options(SHORT)),
        cwd=place,
        CAMVID_ROOT=str(camvid),
    )
    assert 'resumed epoch: 0, iter: 2' in output, tail(output)
    assert losses(resumed) == {3: losses(trained)[3]}
    history = torch.load(resumed / 'iter_3.pth', weights_only=True)['message_hub']['log_scalars']
    assert len(history['train/loss'].data[0]) == 3


def test_same_seed_same_losses(trained, camvid, place):
    """With the data root written without the slash."""
    call(
        *(sys.executable, toolbox('mmseg', 'train.py'), CONFIG, '--work-dir', 'again'),
        *options(SHORT),
        cwd=place,
        CAMVID_ROOT=str(camvid),
    )
    assert losses(place / 'again') == losses(trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    'pattern', ['nano/upernet_vil-nano*camvid*.py', 'nano/upernet_secvit-nano*camvid*.py']
)
def test_other_backbones(pattern, camvid, tmp_path):
    call(
        *(sys.executable, toolbox('mmseg', 'train.py'), the_config(pattern), '--work-dir', 'work'),
        *options(SHORT),
        cwd=tmp_path,
        CAMVID_ROOT=str(camvid),
    )
    assert all(map(math.isfinite, losses(tmp_path / 'work').values()))
    assert 'mIoU' in log(tmp_path / 'work')[-1]


def test_mim_test(trained, camvid, place):
    output = call(
        *('mim', 'test', 'mmsegmentation', CONFIG, '--checkpoint', trained / 'iter_2.pth'),
        *('--work-dir', 'tested'),
        cwd=place,
        CAMVID_ROOT=str(camvid),
    )
    assert {'mIoU', 'mAcc', 'aAcc'} <= set(metrics(place / 'tested')), tail(output)


INFERENCER = """
import json, sys
from mmseg.apis import MMSegInferencer

config, checkpoint, image = sys.argv[1:]
inferencer = MMSegInferencer(config, checkpoint)
labels = inferencer(image)['predictions']
classes = inferencer.model.dataset_meta['classes']
found = set(labels.flatten().tolist())
print(json.dumps(dict(shape=labels.shape, labels=sorted(found), classes=classes)))
"""


def test_inferencer(trained, camvid, place):
    image = camvid / 'images' / 'val' / '0.jpg'
    command = sys.executable, '-c', INFERENCER, CONFIG, trained / 'iter_2.pth', image
    found = last_line(call(*command, cwd=place))
    assert tuple(found['shape']) == cv2.imread(str(image)).shape[:2]
    assert found['labels'] and set(found['labels']) <= set(range(CAMVID_CLASSES))
    assert found['classes'] == list(Config.fromfile(CONFIG).metainfo.classes)
