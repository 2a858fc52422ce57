"""Mask R-CNN from a foreign folder: trained, tested and asked, each in a process of its own."""

import argparse
import math
import shutil
import sys

import cv2
import forks
import goldens
import numpy as np
import pytest
import torch
from mmengine.config import Config
from processes import (
    call,
    last_line,
    log,
    losses,
    metrics,
    options,
    run,
    tail,
    the_config,
    toolbox,
)
from toy_data import NUTS, draw_nuts

from visionseq_mm.registry import MODELS

CONFIG = the_config('nano/mask-rcnn_vim-nano*nuts*.py')
#: The photographs' 4:3, in fewer pixels.
SMALL = {
    f'{loader}.dataset.pipeline.{index}.scale': '(160,120)'
    for loader, index in (
        ('train_dataloader', 2),
        ('val_dataloader', 1),
        ('test_dataloader', 1),
    )
}
SHORT = {
    'train_cfg.max_iters': 3,
    'default_hooks.logger.interval': 1,
    'default_hooks.checkpoint.interval': 1,
}
METRICS = {'coco/bbox_mAP', 'coco/segm_mAP'}


@pytest.fixture(scope='module')
def nuts(tmp_path_factory):
    return draw_nuts(tmp_path_factory.mktemp('data') / 'a few nuts')


@pytest.fixture(scope='module')
def official(place):
    """A checkpoint of the config's backbone like the official ones of Vim, at 224x224 pixels."""
    torch.manual_seed(1)  # the training has 0
    settings = Config.fromfile(CONFIG).model.backbone
    settings.update(img_size=224, out_type='cls', out_indices=None)
    ours = MODELS.build(settings).state_dict()
    patches = ours.pop('pos_embed').flatten(1, 2)
    middle = patches.shape[1] // 2
    cls = ours.pop('cls_pos_embed')
    weights = {
        'pos_embed': torch.cat([patches[:, :middle], cls, patches[:, middle:]], dim=1),
        'norm_f.weight': ours.pop('final_norm.weight'),
        'head.weight': torch.randn(1000, patches.shape[2]),
        'head.bias': torch.zeros(1000),
        **{name.replace('blocks.', 'layers.'): tensor for name, tensor in ours.items()},
    }
    path = place / 'official.pth'
    torch.save({'model': weights, 'epoch': 299, 'args': argparse.Namespace(lr=5e-4)}, path)
    return path


@pytest.fixture(scope='module')
def trained(place, nuts, official):
    """The work folder of three iterations, begun with the official file."""
    call(
        *('mim', 'train', forks.MMDET, CONFIG, '--work-dir', 'trained'),
        *options(
            {
                'randomness.seed': 0,
                'model.backbone.init_cfg.type': 'Pretrained',
                'model.backbone.init_cfg.checkpoint': official,
            },
            SHORT,
            SMALL,
        ),
        cwd=place,
        NUTS_ROOT=str(nuts),
    )
    return place / 'trained'


def test_training(trained):
    assert list(losses(trained)) == [1, 2, 3]
    assert all(map(math.isfinite, losses(trained).values())), losses(trained)
    validation = log(trained)[-1]
    assert set(validation) >= METRICS


def test_training_began_with_the_official_weights(trained, official):
    """The rate is still that of the warm-up, so two iterations move nothing far."""
    after = torch.load(trained / 'iter_2.pth', weights_only=True)['state_dict']
    before = torch.load(official, weights_only=True)['model']
    layers = {name: tensor for name, tensor in before.items() if name.startswith('layers.')}
    assert layers
    for name, tensor in layers.items():
        moved = (after[f'backbone.blocks.{name.removeprefix("layers.")}'] - tensor).abs().max()
        assert moved < 1e-3, name


def test_resuming(trained, nuts, place):
    """After two of three iterations, and without the seed, which is in the file.

    The third loss is that of the training that went on, from the same images, flips and samples.
    """
    resumed = place / 'resumed'
    resumed.mkdir()
    checkpoint = shutil.copy(trained / 'iter_2.pth', resumed)
    (resumed / 'last_checkpoint').write_text(str(checkpoint))
    call(
        *(sys.executable, toolbox('mmdet', 'train.py'), CONFIG, '--work-dir', 'resumed'),
        *('--resume', *options(SHORT, SMALL)),
        cwd=place,
        NUTS_ROOT=str(nuts),
    )
    assert losses(resumed) == {3: losses(trained)[3]}


def test_mim_test(trained, nuts, place):
    """The data root may end in a slash."""
    output = call(
        *('mim', 'test', forks.MMDET, CONFIG, '--checkpoint', trained / 'iter_2.pth'),
        *('--work-dir', 'tested', *options(SMALL)),
        cwd=place,
        NUTS_ROOT=f'{nuts}/',
    )
    assert set(metrics(place / 'tested')) >= METRICS, tail(output)


def test_test_time_augmentation(trained, nuts, place):
    """Flipped views too; masks are scored as well as boxes."""
    call(
        *('mim', 'test', forks.MMDET, CONFIG, '--checkpoint', trained / 'iter_2.pth'),
        *('--work-dir', 'augmented', '--tta', *options(SMALL)),
        cwd=place,
        NUTS_ROOT=str(nuts),
    )
    assert set(metrics(place / 'augmented')) >= METRICS


def test_spawned_workers(trained, nuts, place):
    """mmdet's own script; a spawned worker imports everything again."""
    output = call(
        *(sys.executable, toolbox('mmdet', 'test.py'), CONFIG, trained / 'iter_2.pth'),
        *('--work-dir', 'spawned'),
        *options(
            {'env_cfg.mp_cfg.mp_start_method': 'spawn', 'test_dataloader.num_workers': 1}, SMALL
        ),
        cwd=place,
        NUTS_ROOT=str(nuts),
    )
    assert set(metrics(place / 'spawned')) >= METRICS, tail(output)


INFERENCER = """
import json, sys
from mmdet.apis import DetInferencer

config, checkpoint, image = sys.argv[1:]
inferencer = DetInferencer(config, checkpoint, show_progress=False)
(found,) = inferencer(image)['predictions']
classes = inferencer.visualizer.dataset_meta['classes']
print(json.dumps(dict(found, classes=classes)))
"""


def test_inferencer(trained, nuts, place):
    image = nuts / 'images' / '0.jpg'
    command = sys.executable, '-c', INFERENCER, CONFIG, trained / 'iter_2.pth', image
    found = last_line(call(*command, cwd=place))
    assert tuple(found['classes']) == NUTS
    number = len(found['scores'])
    assert number > 0
    assert len(found['labels']) == len(found['bboxes']) == len(found['masks']) == number
    assert set(found['labels']) <= {0, 1, 2}
    height, width = cv2.imread(str(image)).shape[:2]
    boxes = np.array(found['bboxes'])
    assert boxes.min() >= 0
    assert (boxes.max(0) <= (width, height, width, height)).all()
    assert all(mask['size'] == [height, width] for mask in found['masks'])


def test_file_of_another_variant_ends_the_training(nuts, place):
    """With the reason, and before the first iteration."""
    tiny = place / 'tiny.pth'
    torch.save({'model': goldens.load('vim_tiny').weights}, tiny)
    status, output = run(
        *(sys.executable, toolbox('mmdet', 'train.py'), CONFIG, '--work-dir', 'refused'),
        *options(
            {
                'model.backbone.init_cfg.type': 'Pretrained',
                'model.backbone.init_cfg.checkpoint': tiny,
                'default_hooks.logger.interval': 1,
            },
            SMALL,
        ),
        cwd=place,
        NUTS_ROOT=str(nuts),
    )
    assert status != 0, tail(output)
    assert 'CheckpointMismatchError: ' in output, tail(output)
    assert 'does not fit the backbone Vim' in output, tail(output)
    assert 'Iter(train)' not in output, tail(output)
