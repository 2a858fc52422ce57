"""tools/train.py and tools/test.py: the right toolbox's script, with the right flags."""

import importlib.util
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest

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
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
"""

SEGMENTOR = """
default_scope = 'mmseg'
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
"""

DETECTOR = """
default_scope = 'mmdet'
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

DISTRIBUTED = """
custom_imports = dict(imports=['visionseq_mm.registry', 'without_gpu'])
model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
"""

# mmengine's launcher asks for a GPU here and in its default wrapper, and nowhere else.
WITHOUT_GPU = 'import torch\ntorch.cuda.set_device = lambda device: None\n'


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
    write(root / 'distributed.py', COMMON + SEGMENTOR + DISTRIBUTED)
    write(root / 'without_gpu.py', WITHOUT_GPU)
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


def test_segmentor(data, tmp_path):
    """From another folder; mmseg's own script could neither scale the rate nor resume a file."""
    train = (sys.executable, TOOLS / 'train.py', data / 'segmentor.py', '--work-dir', 'work')
    assert 'LR is set based on batch size' in call(*train, '--auto-scale-lr', cwd=tmp_path)
    train = (*train, '--cfg-options', 'train_cfg.max_iters=2')
    log = call(*train, '--resume', 'work/iter_1.pth', cwd=tmp_path)
    assert 'resumed epoch: 0, iter: 1' in log

    test = (sys.executable, TOOLS / 'test.py', data / 'segmentor.py', 'work/iter_2.pth')
    assert 'mIoU' in call(*test, '--out', 'predictions', cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / 'predictions').iterdir()) == ['0.png', '1.png']


def test_detector(data, tmp_path):
    train = (sys.executable, TOOLS / 'train.py', data / 'detector.py')
    call(*train, cwd=tmp_path)
    checkpoint = tmp_path / 'work_dirs' / 'detector' / 'iter_1.pth'
    test = (sys.executable, TOOLS / 'test.py', data / 'detector.py', checkpoint)
    assert 'bbox_mAP' in call(*test, '--out', 'predictions.pkl', cwd=tmp_path)
    assert len(pickle.loads((tmp_path / 'predictions.pkl').read_bytes())) == 2


@pytest.mark.slow
def test_two_processes(data, tmp_path):
    config = data / 'distributed.py'
    where = {'cwd': tmp_path, 'PYTHONPATH': str(data)}
    call(TOOLS / 'dist_train.sh', config, 2, '--work-dir', 'work', **where)
    assert 'mIoU' in call(TOOLS / 'dist_test.sh', config, 'work/iter_1.pth', 2, **where)
