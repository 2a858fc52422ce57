"""tools/train.py and tools/test.py: the right toolbox's script, with the right flags."""

import argparse
import importlib.util
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import forks
import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def toolbox(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module('_toolbox')
    del sys.modules['_toolbox']


@pytest.fixture
def for_mmseg(toolbox):
    return runpy.run_path(str(TOOLS / 'train.py'))['for_mmseg']


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize('name', ['train.py', 'test.py'])
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_finds_the_toolbox_script(toolbox, scope, name):
    script = toolbox.toolbox_script(scope, name)
    assert script.is_file()
    assert script.relative_to(Path(importlib.util.find_spec(scope).origin).parents[1])


def test_finds_the_script_of_a_toolbox_checkout(toolbox, tmp_path, monkeypatch):
    for folder in ('mmdet', 'tools'):
        (tmp_path / folder).mkdir()
    write(tmp_path / 'mmdet' / '__init__.py', '')
    script = write(tmp_path / 'tools' / 'train.py', '')
    monkeypatch.delitem(sys.modules, 'mmdet', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert toolbox.toolbox_script('mmdet', 'train.py') == script
    with pytest.raises(SystemExit, match=r'mmdet has no test\.py of its own'):
        toolbox.toolbox_script('mmdet', 'test.py')


def test_reads_the_scope(toolbox, tmp_path):
    write(tmp_path / 'base.py', "default_scope = 'mmdet'\n")
    config = write(tmp_path / 'config.py', "_base_ = 'base.py'\n")
    assert toolbox.default_scope(config) == 'mmdet'
    assert toolbox.default_scope(config, {'default_scope': 'mmseg'}) == 'mmseg'


@pytest.mark.parametrize(
    'text, found', [('', 'no default_scope'), ("default_scope = 'mmpose'\n", "= 'mmpose'")]
)
def test_unknown_scope(toolbox, tmp_path, text, found):
    config = write(tmp_path / 'config.py', text)
    with pytest.raises(SystemExit, match=rf"config\.py has .*{found}.*one of 'mmdet', 'mmseg'"):
        toolbox.default_scope(config)


def test_missing_toolbox(toolbox, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match=r"'mmseg', but .* pip install mmsegmentation"):
        toolbox.toolbox_script('mmseg', 'train.py')


@pytest.mark.parametrize(
    'flags, expected',
    [
        ('c.py --amp --work-dir w', 'c.py --amp --work-dir w'),
        ('c.py --resume --amp', 'c.py --amp --resume --cfg-options load_from=None'),
        ('c.py --resume a.pth', 'c.py --resume --cfg-options load_from=a.pth'),
        ('c.py --auto-scale-lr', 'c.py --cfg-options auto_scale_lr.enable=True'),
        (
            'c.py --cfg-options a=1 b=2 --auto-scale-lr --resume=a.pth',
            'c.py --cfg-options a=1 b=2 --resume '
            '--cfg-options load_from=a.pth auto_scale_lr.enable=True',
        ),
    ],
)
def test_flags_for_mmseg(for_mmseg, flags, expected):
    assert for_mmseg(flags.split()) == expected.split()


# --- short runs with stock models ---------------------------------------------------------------

COMMON = """
data_root = '{{ fileDirname }}'
custom_imports = dict(imports=['visionseq_mm.registry'], allow_failed_imports=False)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
val_cfg = None
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    visualization=dict(type='VisualizationHook'),
)
"""

SEGMENTOR = """
default_scope = 'mmseg'
default_hooks.update(visualization=dict(type='SegVisualizationHook', interval=1))
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
loader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_prefix=dict(img_path=data_root + '/images', seg_map_path=data_root + '/labels'),
        metainfo=dict(classes=('a', 'b')),
        pipeline=[*load, dict(type='PackSegInputs')],
    ),
)
train_dataloader = test_dataloader = loader
test_evaluator = dict(type='IoUMetric')
norm = dict(type='BN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(type='ResNet', depth=18, base_channels=8, norm_cfg=norm),
    decode_head=dict(
        type='FCNHead', in_channels=64, channels=8, num_convs=1, num_classes=2, norm_cfg=norm
    ),
    test_cfg=dict(mode='whole'),
)
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
tta_pipeline = [
    load[0],
    dict(type='TestTimeAug', transforms=[flips, [load[1]], [dict(type='PackSegInputs')]]),
]
tta_model = dict(type='SegTTAModel')
"""

DETECTOR = """
default_scope = 'mmdet'
default_hooks.update(visualization=dict(type='DetVisualizationHook'))
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
loader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='instances.json',
        data_prefix=dict(img='images'),
        metainfo=dict(classes=('a',)),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64)),
            dict(type='PackDetInputs'),
        ],
    ),
)
train_dataloader = test_dataloader = loader
test_evaluator = dict(type='CocoMetric', ann_file=data_root + '/instances.json')
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, base_channels=8, frozen_stages=-1),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=1, in_channels=8, stacked_convs=1, feat_channels=8
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10
    ),
)
"""

CLASSIFIER = """
default_scope = 'mmpretrain'
loader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        ann_file='classes.txt',
        data_prefix='images',
        metainfo=dict(classes=('a', 'b')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
train_dataloader = test_dataloader = loader
test_evaluator = dict(type='Accuracy', topk=1)
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, base_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64),
)
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two images with labels and boxes, and a config for each toolbox beside them."""
    root = tmp_path_factory.mktemp('data')
    random = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(2):
        for folder, shape, high in (('images', (64, 64, 3), 256), ('labels', (64, 64), 2)):
            (root / folder).mkdir(exist_ok=True)
            pixels = random.integers(high, size=shape, dtype=np.uint8)
            suffix = 'jpg' if folder == 'images' else 'png'
            assert cv2.imwrite(str(root / folder / f'{i}.{suffix}'), pixels)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=64, height=64))
        annotations.append(
            dict(id=i, image_id=i, category_id=1, bbox=[8, 8, 32, 32], area=1024, iscrowd=0)
        )
    categories = [dict(id=1, name='a')]
    instances = dict(images=images, annotations=annotations, categories=categories)
    mmengine.dump(instances, root / 'instances.json')
    write(root / 'segmentor.py', COMMON + SEGMENTOR)
    write(root / 'detector.py', COMMON + DETECTOR)
    write(root / 'classifier.py', COMMON + CLASSIFIER)
    write(root / 'classes.txt', '0.jpg 0\n1.jpg 1\n')
    return root


def call(*command, cwd, **environment):
    """Both outputs of ``command``, run in ``cwd`` with this Python as `python`."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, 'PATH': path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


AMP = '--amp', '--cfg-options', 'optim_wrapper.type=visionseq_mm.AmpOptimWrapper'


def test_segmentor(data, tmp_path):
    """From another folder; mmseg's own script could neither scale the rate nor resume a file."""
    train = (sys.executable, TOOLS / 'train.py', data / 'segmentor.py', '--work-dir', 'work')
    log = call(*train, '--auto-scale-lr', *AMP, cwd=tmp_path)
    assert 'LR is set based on batch size' in log
    assert 'AMP is on already, by optim_wrapper.type=visionseq_mm.AmpOptimWrapper.' in log
    train = (*train, '--cfg-options', 'train_cfg.max_iters=2')
    log = call(*train, '--resume', 'work/iter_1.pth', cwd=tmp_path)
    assert 'resumed epoch: 0, iter: 1' in log

    test = (sys.executable, TOOLS / 'test.py', data / 'segmentor.py', 'work/iter_2.pth')
    flags = '--out', 'predictions', '--tta', '--show-dir', 'show', '--work-dir', 'test'
    log = call(*test, *flags, cwd=tmp_path)
    assert 'mIoU' in log and 'SegTTAModel' in log
    assert sorted(path.name for path in (tmp_path / 'predictions').iterdir()) == ['0.png', '1.png']
    assert drawn(tmp_path) == 2


def drawn(folder):
    """How many pictures --show-dir has; the toolboxes put them in different places."""
    files = [*folder.rglob('*.png'), *folder.rglob('*.jpg')]
    return sum('show' in path.relative_to(folder).parts for path in files)


@pytest.mark.parametrize(
    ('name', 'measured', 'tta'), [('detector', 'bbox_mAP', ['--tta']), ('classifier', 'top1', [])]
)
def test_detector_and_classifier(data, tmp_path, name, measured, tta):
    """mmpretrain cannot draw what --tta gives."""
    train = (sys.executable, TOOLS / 'train.py', data / f'{name}.py')
    log = call(*train, '--auto-scale-lr', *AMP, cwd=tmp_path)
    assert 'LR is set based on batch size' in log and 'AMP is on already' in log
    checkpoint = tmp_path / 'work_dirs' / name / 'iter_1.pth'
    test = (sys.executable, TOOLS / 'test.py', data / f'{name}.py', checkpoint)
    flags = '--out', 'predictions.pkl', '--show-dir', 'show', '--work-dir', 'test', *tta
    log = call(*test, *flags, cwd=tmp_path)
    assert measured in log and ('TTAModel' in log) == bool(tta)
    assert len(pickle.loads((tmp_path / 'predictions.pkl').read_bytes())) == 2
    assert drawn(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize('name', ['detector', 'segmentor', 'classifier'])
def test_resuming_the_latest_and_tta(data, tmp_path, name):
    train = (sys.executable, TOOLS / 'train.py', data / f'{name}.py', '--work-dir', 'work')
    call(*train, cwd=tmp_path)
    log = call(*train, '--resume', '--cfg-options', 'train_cfg.max_iters=2', cwd=tmp_path)
    assert 'resumed epoch: 0, iter: 1' in log
    test = (sys.executable, TOOLS / 'test.py', data / f'{name}.py', 'work/iter_2.pth', '--tta')
    assert 'TTA' in call(*test, cwd=tmp_path)


# --- several processes --------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path):
    """No GPU, a free port, and an `srun` that sets the variables of Slurm for a task."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    write(folder / 'srun', SRUN).chmod(0o755)
    write(folder / 'scontrol', SCONTROL).chmod(0o755)
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    path = f'{folder}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return dict(CUDA_VISIBLE_DEVICES='', PORT=port, MASTER_PORT=port, PATH=path)


# Of several tasks it starts the first alone; its own arguments end at the command.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.txt
while [ "$1" != python ]; do
    case $1 in --ntasks=*) tasks=${1#*=};; esac
    shift
done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=$tasks SLURM_NODELIST=node[3-4]
[ "$tasks" != 1 ] || exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$*" = 'show hostnames node[3-4]' ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""


def test_slurm(data, tmp_path, environment):
    """One task trains through mmengine's launcher, with flags after the arguments and before."""
    config = data / 'segmentor.py'
    job = TOOLS / 'slurm_train.sh', 'part', 'a job', config, 'a work'
    log = call(
        *(*job, '--cfg-options', 'randomness.seed=5'),
        **dict(cwd=tmp_path, GPUS='1', PY_ARGS='--auto-scale-lr', **environment),
    )
    for text in ('launcher: slurm', 'Distributed training: True', 'LR is set based', 'seed: 5'):
        assert text in log
    assert (tmp_path / 'a work' / 'iter_1.pth').exists()
    assert (tmp_path / 'srun.txt').read_text().splitlines()[:14] == [
        *('-p', 'part', '--job-name=a job', '--gres=gpu:1', '--ntasks=1', '--ntasks-per-node=1'),
        *('--cpus-per-task=5', '--kill-on-bad-exit=1', 'python', '-u', f'{TOOLS}/train.py'),
        *(str(config), '--work-dir=a work', '--launcher'),
    ]


def test_slurm_on_two_nodes(tmp_path, environment):
    settings = dict(GPUS='16', CPUS_PER_TASK='3', SRUN_ARGS='--quiet -x node7')
    job = TOOLS / 'slurm_test.sh', 'part', 'job', 'config.py', 'last.pth', '--out', 'a folder'
    call(*job, cwd=tmp_path, **settings, **environment)
    assert (tmp_path / 'srun.txt').read_text().splitlines() == [
        *('-p', 'part', '--job-name=job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8'),
        *('--cpus-per-task=3', '--kill-on-bad-exit=1', '--quiet', '-x', 'node7', 'python', '-u'),
        *(f'{TOOLS}/test.py', 'config.py', 'last.pth', '--launcher', 'slurm', '--out', 'a folder'),
    ]


@pytest.mark.parametrize('name', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_usage(name):
    done = subprocess.run([TOOLS / f'{name}.sh', 'first'], capture_output=True, text=True)
    assert done.returncode != 0
    assert 'usage: ' in done.stderr and f'tools/{name}.sh' in done.stderr


@pytest.mark.slow
def test_two_processes(data, tmp_path, environment):
    config = data / 'segmentor.py'
    where = dict(cwd=tmp_path, **environment)
    call(TOOLS / 'dist_train.sh', config, 2, '--work-dir', 'work', **where)
    assert 'mIoU' in call(TOOLS / 'dist_test.sh', config, 'work/iter_1.pth', 2, '--tta', **where)


@pytest.mark.slow
def test_sync_bn_is_refused_in_testing(data, tmp_path, environment):
    """torch's wrapper would refuse it, though not the layer, which uses its own statistics."""
    sync_bn = 'norm.type=SyncBN', 'model.decode_head.norm_cfg.type=SyncBN'
    command = TOOLS / 'dist_test.sh', data / 'segmentor.py', 'lost.pth', 1, '--cfg-options'
    with pytest.raises(
        AssertionError, match=r'--cfg-options model\.decode_head\.norm_cfg\.type=BN'
    ):
        call(*command, *sync_bn, cwd=tmp_path, **environment)


def test_finds_sync_bn(toolbox):
    norm = dict(type='SyncBN')
    model = dict(backbone=dict(norm_cfg=dict(type='BN')), heads=[dict(), dict(norm_cfg=norm)])
    model['neck'] = dict(type=torch.nn.SyncBatchNorm)
    with pytest.raises(SystemExit) as exit:
        toolbox.refuse_sync_bn(Config(dict(model=model, sync_bn='torch')), 'c.py')
    message, options = str(exit.value).splitlines()
    assert message.startswith('c.py has SyncBN at model.heads.1.norm_cfg, model.neck, sync_bn. ')
    options = options.split()[1:]
    assert options == ['model.heads.1.norm_cfg.type=BN', 'model.neck.type=BN', 'sync_bn=None']
    cfg = Config(dict(model=model, sync_bn='torch'))
    parser = toolbox.make_parser('')
    cfg.merge_from_dict(parser.parse_args(['c.py', '--cfg-options', *options]).cfg_options)
    toolbox.refuse_sync_bn(cfg, 'c.py')


ONE_OF_ONE = dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='1', MASTER_ADDR='127.0.0.1')


@pytest.mark.skipif(get_device() != 'cpu', reason='starts processes without an accelerator')
@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        (
            dict(find_unused_parameters=True),
            'type=MMDistributedDataParallel device_ids=None broadcast_buffers=False '
            'find_unused_parameters=True',
        ),
        (dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel')), ''),
    ],
)
def test_flags_without_a_gpu(toolbox, monkeypatch, environment, cfg, expected):
    """And the process group, here that of MPI, whose variables mmengine's launcher reads."""
    args = argparse.Namespace(config='c.py', launcher='none')
    assert toolbox.without_gpu(Config(cfg), args) == []
    args.launcher = 'mpi'
    with pytest.raises(SystemExit, match='launcher mpi, but the environment has no OMPI_COMM_'):
        toolbox.without_gpu(Config(cfg), args)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(name, 'to be put back')
    for name, value in dict(ONE_OF_ONE, OMPI_COMM_WORLD_LOCAL_RANK='0').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('MASTER_PORT', environment['MASTER_PORT'])
    flags = toolbox.without_gpu(Config(cfg), args)
    assert torch.distributed.get_backend() == 'gloo'
    torch.distributed.destroy_process_group()
    assert [flag.removeprefix('model_wrapper_cfg.') for flag in flags[1:]] == expected.split()


@pytest.mark.parametrize(
    ('kind', 'kept'),
    [('OptimWrapper', True), ('AmpOptimWrapper', False), (AmpOptimWrapper, False), (None, True)],
)
def test_amp_is_asked_for_once(toolbox, kind, kept):
    without = runpy.run_path(str(TOOLS / 'train.py'))['without_second_amp']
    cfg = Config(dict(optim_wrapper=dict(type=kind)) if kind else {})
    left = ['c.py', '--amp', '--resume'] if kept else ['c.py', '--resume']
    assert without(['c.py', '--amp', '--resume'], cfg) == left
    assert without(['c.py'], cfg) == ['c.py']


def test_amp_against_float32(toolbox):
    """The wrapper with its precision turned off, and the flag: one of them is a mistake."""
    without = runpy.run_path(str(TOOLS / 'train.py'))['without_second_amp']
    cfg = Config(dict(optim_wrapper=dict(type='visionseq_mm.AmpOptimWrapper', dtype='float32')))
    assert without(['c.py'], cfg) == ['c.py']
    with pytest.raises(SystemExit, match=r"--amp contradicts optim_wrapper\.dtype='float32'"):
        without(['c.py', '--amp'], cfg)


def test_tta_of_mmseg_without_its_settings(toolbox):
    check = runpy.run_path(str(TOOLS / 'test.py'))['check_tta']
    check(Config(dict(tta_model={}, tta_pipeline=[])), 'c.py')
    with pytest.raises(SystemExit, match=r'c\.py has no tta_pipeline, which mmseg needs'):
        check(Config(dict(tta_model={})), 'c.py')


# --- mim ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ('package', 'name'),
    [
        (forks.MMDET, 'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128'),
        ('mmsegmentation', 'upernet_vim-nano_1xb8-300_shapes-128x128'),
    ],
)
def test_mim_gridsearch(tmp_path, monkeypatch, package, name):
    """The second loss depends on the rate of the first step, the first on the seed alone."""
    monkeypatch.syspath_prepend(TOOLS)
    draw = importlib.import_module('_drawing').draw_split
    for seed, split in enumerate(('train', 'val')):
        draw(tmp_path / 'data', split, 4, seed)
    settings = dict(max_iters=2, val_interval=2)
    options = [f'train_cfg.{key}={value}' for key, value in settings.items()]
    options += ['param_scheduler=None', 'randomness.seed=0', 'default_hooks.logger.interval=1']
    call(
        *('mim', 'gridsearch', package, TOOLS.parent / 'configs' / 'nano' / f'{name}.py'),
        *('--gpus', 0, '--launcher', 'none', '--work-dir', 'grid'),
        *('--search-args', '--optim_wrapper.optimizer.lr 1e-3 2e-3'),
        *('--cfg-options', *options, 'train_dataloader.batch_size=2'),
        **dict(cwd=tmp_path, SHAPES_ROOT=str(tmp_path / 'data'), OMP_NUM_THREADS='1'),
    )
    losses = []
    for rate in 0.001, 0.002:
        folder = tmp_path / f'grid_search_optim_wrapper.optimizer.lr_{rate}'
        (file,) = folder.glob('*/vis_data/scalars.json')
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines[0]['base_lr'] == rate
        losses.append([line['loss'] for line in lines if 'loss' in line])
    (first, second), (again, other) = losses
    assert first == again and second != other
