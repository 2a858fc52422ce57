"""Two processes on a CPU, through tools/dist_train.sh: the losses of one with the whole batch."""

import math
import socket
import sys

import cv2
import pytest
import torch
from processes import ROOT, call, log, losses, options, run, tail, the_config
from toy_data import UNLABELLED, draw_camvid, draw_nuts

import visionseq_mm.registry  # noqa: F401, makes mmengine's checkpoints loadable

UPERNET = the_config('nano/upernet_vim-nano*camvid*.py')
#: Loaded by custom_imports; mmengine logs the first process's losses alone.
MEAN_LOSS = """
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class MeanLossHook(Hook):
    priority = 'HIGHEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        outputs['loss_here'] = outputs['loss'].detach()
        outputs['loss'] = outputs['loss_here'].clone()
        all_reduce(outputs['loss'], 'mean')
"""
#: No randomness and no statistics of the batch: the same images in any number of processes.
SAME_IN_ANY_SPLIT = f"""
_base_ = {str(UPERNET)!r}
custom_imports = dict(
    imports=['visionseq_mm.registry', 'mean_loss'], allow_failed_imports=False
)
custom_hooks = [*_base_.custom_hooks, dict(type='MeanLossHook')]
norm_cfg = dict(_delete_=True, type='GN', num_groups=4)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(arch=dict(embed_dims=32, depth=4), img_size=64),
    neck=dict(in_channels=[32] * 4, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[32] * 4, channels=16, dropout_ratio=0.0, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=32, channels=16, dropout_ratio=0.0, norm_cfg=norm_cfg),
)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(shuffle=False),
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='Resize', scale=(64, 64), keep_ratio=False),
            dict(type='PackSegInputs'),
        ]
    ),
)
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.5))
param_scheduler = None
randomness = dict(seed=0)
train_cfg = dict(max_iters=6)
val_cfg = val_dataloader = val_evaluator = None
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=6))
log_processor = dict(window_size=1)
find_unused_parameters = False
"""


@pytest.fixture(scope='module')
def camvid(tmp_path_factory):
    """Every pixel labelled, so that the mean over two halves is the mean over all."""
    root = draw_camvid(tmp_path_factory.mktemp('data') / 'camvid')
    for path in root.glob('annotations/*/*.png'):
        labels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        labels[labels == UNLABELLED] = 0
        assert cv2.imwrite(str(path), labels)
    return root


@pytest.fixture
def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return str(server.getsockname()[1])


@pytest.fixture
def train(place, camvid, free_port):
    """Trains in ``processes`` processes, with two images a step in all; gives the work folder."""
    (place / 'mean_loss.py').write_text(MEAN_LOSS)
    (place / 'upernet.py').write_text(SAME_IN_ANY_SPLIT)

    def train(work_dir, processes, **settings):
        settings = options({'train_dataloader.batch_size': 2 // processes, **settings})
        start = ROOT / 'tools' / 'dist_train.sh', 'upernet.py', processes
        if processes == 1:
            start = sys.executable, ROOT / 'tools' / 'train.py', 'upernet.py'
        call(
            *(*start, '--work-dir', work_dir, *settings),
            cwd=place,
            CAMVID_ROOT=str(camvid),
            PYTHONPATH=str(place),
            PORT=free_port,
        )
        return place / work_dir

    return train


@pytest.mark.parametrize('with_cp', [pytest.param(False, marks=pytest.mark.slow), True])
def test_same_losses_and_weights(train, with_cp):
    """Recomputation with find_unused_parameters=False needs the non-reentrant form."""
    recompute = {'model.backbone.with_cp': with_cp}
    one, two = (train(f'{n} {with_cp}', n, **recompute) for n in (1, 2))
    whole, halves = losses(one), losses(two)
    assert list(whole) == list(range(1, 7))
    assert halves == pytest.approx(whole, rel=1e-5)
    assert whole[5] < 0.95 * whole[1], whole  # of the same two images
    here = {entry['iter']: entry['loss_here'] for entry in log(two) if 'loss_here' in entry}
    apart = max(abs(here[i] / halves[i] - 1) for i in halves)
    assert apart > 1e-3, 'both processes see the same images'

    weights, again = (
        torch.load(folder / 'iter_6.pth', weights_only=True)['state_dict'] for folder in (one, two)
    )
    assert weights.keys() == again.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_sync_bn_is_refused_with_the_options_that_replace_it(place, camvid, free_port):
    """One process of several is enough: the message comes before they meet."""
    environment = dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_PORT=free_port)
    start = sys.executable, ROOT / 'tools' / 'train.py', UPERNET, '--launcher', 'pytorch'
    where = dict(cwd=place, CAMVID_ROOT=str(camvid))
    status, output = run(*start, **where, **environment)
    assert status != 0
    flag, *named = output.splitlines()[-1].split()
    parts = 'neck', 'decode_head', 'auxiliary_head'
    assert flag == '--cfg-options', tail(output)
    assert set(named) == {f'model.{part}.norm_cfg.type=BN' for part in parts}
    assert 'SyncBN needs GPUs' in output


@pytest.mark.parametrize(
    'pattern',
    [
        'retinanet_secvit-nano*nuts*',
        pytest.param('mask-rcnn_vim-nano*nuts*', marks=pytest.mark.slow),
        pytest.param('upernet_vim-*camvid*', marks=pytest.mark.slow),
    ],
)
def test_two_steps_and_a_validation(pattern, tmp_path, free_port):
    """The segmentor with the options that the message about SyncBN names."""
    settings = {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2}
    settings['default_hooks.logger.interval'] = 1
    if pattern.startswith('upernet'):
        data = dict(CAMVID_ROOT=str(draw_camvid(tmp_path / 'data')))
        parts = 'neck', 'decode_head', 'auxiliary_head'
        settings |= {f'model.{part}.norm_cfg.type': 'BN' for part in parts}
        settings['train_dataloader.batch_size'] = 2
    else:
        data = dict(NUTS_ROOT=str(draw_nuts(tmp_path / 'data')))
        scales = ('train_dataloader', 2), ('val_dataloader', 1)
        settings |= {f'{name}.dataset.pipeline.{i}.scale': '(160,120)' for name, i in scales}
        settings['train_dataloader.batch_size'] = 1
    if pattern.startswith('retinanet'):
        settings['model.test_cfg.score_thr'] = 0  # an untrained one is sure of nothing
    call(
        *(ROOT / 'tools' / 'dist_train.sh', the_config(f'nano/{pattern}.py'), 2),
        *('--work-dir', 'work', *options(settings)),
        cwd=tmp_path,
        PORT=free_port,
        **data,
    )
    assert list(losses(tmp_path / 'work')) == [1, 2]
    assert all(map(math.isfinite, losses(tmp_path / 'work').values()))
    assert {'mIoU', 'coco/bbox_mAP'} & set(log(tmp_path / 'work')[-1])
