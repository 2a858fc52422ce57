"""Every config: what it says, and its model; of each kind a training step and a prediction."""

import ast
import copy
import functools
import importlib
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(CONFIGS.rglob('*.py'))
PATHS = [path for path in FILES if '_base_' not in path.parts]
#: Those that train a step and predict at full size: one of each head on each family.
TRAINED = (
    'cascade-mask-rcnn_vil-nano_1xb2-500_nuts-400x300',
    'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128',
    'mask-rcnn_vim-nano_1xb2-500_nuts-400x300',
    'retinanet_secvit-nano_1xb2-500_nuts-400x300',
    'upernet_secvit-nano_1xb8-1k_camvid-160x160',
    'upernet_vil-nano_1xb8-1k_camvid-160x160',
    'upernet_vim-nano_1xb8-1k_camvid-160x160',
    'upernet_vim-nano_1xb8-300_shapes-128x128',
    'cascade-mask-rcnn_secvit-tiny_fpn_ms-3x_coco',
    'cascade-mask-rcnn_vil-tiny_sfp_8xb8-lsj-100e_coco-1024x1024',
    'cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e_coco-1024x1024',
    'cascade-mask-rcnn_deit-tiny_sfp_8xb8-lsj-100e_coco-1024x1024',
    'mask-rcnn_sec-fastervit-tiny_fpn_1x_coco',
    'mask-rcnn_sec-swin-tiny_fpn_1x_coco',
    'mask-rcnn_secvit-tiny_fpn_1x_coco',
    'mask-rcnn_vil-tiny_sfp_1x_coco-1024x1024',
    'mask-rcnn_vim-tiny_sfp_1x_coco-1024x1024',
    'retinanet_secvit-tiny_fpn_1x_coco',
    'retinanet_vil-tiny_sfp_1x_coco-1024x1024',
    'retinanet_vim-tiny_sfp_1x_coco-1024x1024',
    'atss_vil-tiny_sfp_1x_coco-1024x1024',
    'fpn_secvit-tiny_8xb2-80k_ade20k-512x512',
    'mask2former_secvit-tiny_8xb2-160k_ade20k-512x512',
    'upernet_deit-tiny_8xb2-160k_ade20k-1024x1024',
    'upernet_sec-fastervit-tiny_4xb4-160k_ade20k-512x512',
    'upernet_sec-swin-tiny_4xb4-160k_ade20k-512x512',
    'upernet_secvit-tiny_4xb4-160k_ade20k-512x512',
    'upernet_vil-tiny_4xb4-160k_ade20k-512x512',
    'upernet_vim-tiny_4xb4-160k_ade20k-512x512',
    'secvit-tiny_8xb128_in1k',
    'vil2-tiny_16xb128-800e_in1k-192px',
    'vil-tiny_8xb128-400e_in1k',
    'vim-tiny_8xb128_in1k',
)

BATCH, HEIGHT, WIDTH = 2, 96, 128


@functools.cache
def load(path):
    """Read once; what a test changes, it changes in a copy."""
    return Config.fromfile(path)


every_config = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
#: Those whose data are new: every data set, on every kind of model.
one_of_each = pytest.mark.parametrize(
    'path',
    [
        path
        for path in PATHS
        if path.stem in TRAINED or path.parent.name in ('nano', 'custom_data')
    ],
    ids=lambda path: path.stem,
)


def test_names_are_unique():
    """mim finds a config by its bare file name."""
    counts = Counter(path.name for path in FILES)
    assert not [name for name, count in counts.items() if count > 1]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_bases_are_relative(path):
    """Those of a toolbox, 'mmseg::...', depend on what that has in its installed folder."""
    for base in bases(path):
        assert '::' not in base
        assert not Path(base).is_absolute()
        assert (path.parent / base).is_file(), base


def bases(path):
    """What ``_base_`` says, as a list."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '_base_':
            value = ast.literal_eval(node.value)
            return [value] if isinstance(value, str) else value
    return []


@every_config
def test_runtime(path):
    cfg = load(path)
    assert cfg.default_scope in ('mmdet', 'mmseg', 'mmpretrain')
    assert 'visionseq_mm.registry' in cfg.custom_imports.imports
    assert cfg.custom_imports.allow_failed_imports is False
    backends = {backend.type for backend in cfg.visualizer.vis_backends}
    assert backends == {'LocalVisBackend', 'TensorboardVisBackend'}
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == (
        'visionseq_mm.AmpOptimWrapper',
        'bfloat16',
    )
    assert 'tta_model' in cfg or cfg.default_scope == 'mmpretrain'
    # mmdet makes a pipeline of flips where there is none, mmseg does not.
    assert 'tta_pipeline' in cfg or cfg.default_scope != 'mmseg'


@every_config
def test_batch(path):
    """The rate is for the batch that the name tells, or mmdet's 16."""
    cfg = load(path)
    assert cfg.auto_scale_lr.enable is False
    gpus, images = re.search(r'_(\d+)xb(\d+)[-_]', path.stem + '_8xb2_').groups()
    assert cfg.auto_scale_lr.base_batch_size == int(gpus) * int(images)
    assert cfg.train_dataloader.batch_size == int(images)


@every_config
def test_schedule(path):
    """As long as the name tells; no schedule of the rate goes on after the training."""
    cfg = load(path)
    name, length = path.stem, cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    told = re.search(r'[-_](\d+)(e|k)?_(?=coco|ade20k|in1k|nuts|camvid|shapes)', name + '_')
    if '_1x_' in name or '-3x_' in name:
        assert length == (12 if '_1x_' in name else 36)
    elif told:
        assert length == int(told[1]) * (1000 if told[2] == 'k' else 1)
    else:  # DeiT's 300 epochs
        assert name.endswith('_in1k') and length == 300
    by_epoch = cfg.train_cfg.type == 'EpochBasedTrainLoop'
    for schedule in cfg.param_scheduler or []:
        assert schedule.get('end', 0) <= (10**9 if not schedule.get('by_epoch', True) else length)
        assert by_epoch or not schedule.get('by_epoch', True)
        assert all(step < length for step in schedule.get('milestones', []))
    # Files are written, and the best one is known, in the loop's own unit.
    assert cfg.default_hooks.checkpoint.get('by_epoch', True) is by_epoch


@one_of_each
def test_data_root(path, monkeypatch, tmp_path):
    """An environment variable moves all paths, with a slash at its end or without."""
    # The text is that of the file and its bases, before the replacement.
    roots = dict(re.findall(r'\{\{\$(\w+):(.*?)\}\}', load(path).text))
    for name in roots:
        monkeypatch.delenv(name, raising=False)
    cfg = Config.fromfile(path)
    ((variable, default),) = (root for root in roots.items() if root[1] == cfg.data_root)
    texts = dict(strings(cfg.to_dict()))
    before = {key: text for key, text in texts.items() if text.startswith(default)}
    # Nothing may be left of a base's data that this config replaces.
    others = tuple(set(roots.values()) - {default})
    assert not [key for key, text in texts.items() if text.startswith(others)]
    assert {f'{split}_dataloader.dataset.data_root' for split in ('train', 'val', 'test')} <= set(
        before
    )
    for root in (str(tmp_path / 'some data'), str(tmp_path / 'some data') + '/'):
        monkeypatch.setenv(variable, root)
        cfg = Config.fromfile(path)
        after = dict(strings(cfg.to_dict()))
        for key, text in before.items():
            assert os.path.normpath(after[key]) == os.path.normpath(
                root + text.removeprefix(default)
            ), key
        for loader, evaluator in (
            (cfg.val_dataloader, cfg.val_evaluator),
            (cfg.test_dataloader, cfg.test_evaluator),
        ):
            if 'ann_file' in evaluator:
                annotations = Path(loader.dataset.data_root, loader.dataset.ann_file)
                assert Path(evaluator.ann_file) == annotations


def strings(node, key=''):
    """(dotted key, value) of all strings in nested dicts and sequences."""
    if isinstance(node, str):
        yield key.removeprefix('.'), node
    elif isinstance(node, (dict, list, tuple)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for name, value in items:
            yield from strings(value, f'{key}.{name}')


@every_config
def test_classes(path):
    """All heads have as many as the data."""
    cfg = load(path)
    registry = importlib.import_module(f'{cfg.default_scope}.registry')
    dataset = cfg.train_dataloader.dataset
    metainfo = dataset.get('metainfo') or registry.DATASETS.get(dataset.type).METAINFO
    assert set(named(cfg.model.to_dict(), 'num_classes')) == {len(metainfo['classes'])}


def test_metafiles_name_every_config():
    """test_zoo.py builds what they name."""
    named = [
        Path(model['Config']).stem
        for metafile in CONFIGS.glob('*/metafile.yml')
        for model in yaml.safe_load(metafile.read_text())['Models']
    ]
    assert set(named) == {path.stem for path in PATHS if path.parent.name != 'custom_data'}


@pytest.mark.parametrize('name', TRAINED)
def test_training(name):
    """A step reaches all parameters, in bfloat16 too; predictions have their form."""
    torch.manual_seed(0)
    cfg = copy.deepcopy(load(*(path for path in PATHS if path.stem == name)))
    cfg.model.backbone.pop('init_cfg', None)
    make_small(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        registry = importlib.import_module(f'{cfg.default_scope}.registry')
        model = registry.MODELS.build(cfg.model)
        model.init_weights()
        model = revert_sync_batchnorm(model)
        (num_classes,) = set(named(cfg.model.to_dict(), 'num_classes'))
        data, check = CASES[cfg.default_scope](model, num_classes)
        train_step(model, cfg.optim_wrapper, data)
        check(model.eval().test_step(data))


@pytest.mark.gpu
@pytest.mark.parametrize('name', TRAINED)
def test_training_on_a_gpu(name):
    """Two steps as the config says, in bfloat16, and a prediction."""
    cfg = copy.deepcopy(load(*(path for path in PATHS if path.stem == name)))
    cfg.model.backbone.pop('init_cfg', None)
    make_small(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        registry = importlib.import_module(f'{cfg.default_scope}.registry')
        model = revert_sync_batchnorm(registry.MODELS.build(cfg.model)).cuda()
        model.init_weights()
        (num_classes,) = set(named(cfg.model.to_dict(), 'num_classes'))
        data, check = CASES[cfg.default_scope](model, num_classes)
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        assert optim_wrapper.cast_dtype == torch.bfloat16
        for _ in range(2):
            losses = model.train_step(copy.deepcopy(data), optim_wrapper)
            assert losses['loss'].isfinite()
        model.eval()
        check(model.test_step(data))


def make_small(cfg):
    """No padding to 1024x1024, few boxes, and no score is too low for an untrained model."""
    model = cfg.model
    if cfg.default_scope == 'mmpretrain':
        model.data_preprocessor = cfg.data_preprocessor
    elif cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (HEIGHT, WIDTH)
        if 'num_points' in model.decode_head.get('train_cfg', {}):
            model.decode_head.train_cfg.num_points = 64
    else:
        model.data_preprocessor.pad_size_divisor = 32
        model.test_cfg.get('rcnn', model.test_cfg).update(score_thr=0, max_per_img=5)
        if 'rpn' in model.test_cfg:
            model.test_cfg.rpn.max_per_img = model.train_cfg.rpn_proposal.max_per_img = 20


def named(node, key):
    """All values of ``key`` in nested dicts and lists."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from [value] if name == key else named(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from named(value, key)


def train_step(model, optim_wrapper, data):
    """As mmengine's ``model.train_step``, with a look at the gradients."""
    optim_wrapper = build_optim_wrapper(model, optim_wrapper)
    for group in optim_wrapper.optimizer.param_groups:
        # A gain of 1 + weight, for one, must not shrink.
        assert not group['weight_decay'] or all(p.ndim > 1 for p in group['params'])
    model.train()
    data = model.data_preprocessor(data, True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = model.parse_losses(model(**copy.deepcopy(data), mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    optim_wrapper.backward(loss)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trainable.items() if p.grad is None]
    assert not [name for name, p in trainable.items() if not p.grad.isfinite().all()]
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optim_wrapper.step()
    assert any((p != before[name]).any() for name, p in trainable.items())


def detection(model, num_classes):
    """Images with boxes and masks, and what is expected of predictions for them."""
    data = demo_mm_inputs(BATCH, (3, HEIGHT, WIDTH), num_classes=num_classes, with_mask=True)

    def check(samples):
        assert len(samples) == BATCH
        for found in (sample.pred_instances for sample in samples):
            assert len(found), 'an untrained model finds all classes everywhere'
            assert found.bboxes.shape == (len(found), 4)
            assert found.bboxes.isfinite().all()
            assert found.scores.shape == found.labels.shape == (len(found),)
            assert found.labels.min() >= 0
            assert found.labels.max() < num_classes
            assert ('masks' in found) == model.with_mask
            assert not model.with_mask or found.masks.shape == (len(found), HEIGHT, WIDTH)

    return data, check


def segmentation(model, num_classes):
    """Images with label maps, and what is expected of predictions for them."""
    data = dict(
        inputs=list(torch.randint(256, (BATCH, 3, HEIGHT, WIDTH), dtype=torch.uint8)),
        data_samples=[
            SegDataSample(
                gt_sem_seg=PixelData(data=torch.randint(num_classes, (1, HEIGHT, WIDTH))),
                metainfo=dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH)),
            )
            for _ in range(BATCH)
        ],
    )

    def check(samples):
        assert len(samples) == BATCH
        for sample in samples:
            assert sample.seg_logits.data.shape == (num_classes, HEIGHT, WIDTH)
            assert sample.seg_logits.data.isfinite().all()
            assert sample.pred_sem_seg.data.shape == (1, HEIGHT, WIDTH)

    return data, check


def classification(model, num_classes):
    """Images with a label each, and what is expected of predictions for them."""
    data = dict(
        inputs=list(torch.randint(256, (BATCH, 3, HEIGHT, HEIGHT), dtype=torch.uint8)),
        data_samples=[DataSample().set_gt_label(i) for i in range(BATCH)],
    )

    def check(samples):
        assert len(samples) == BATCH
        for sample in samples:
            assert sample.pred_score.shape == (num_classes,)
            assert sample.pred_score.sum().item() == pytest.approx(1, abs=1e-4)
            assert sample.pred_label == sample.pred_score.argmax()

    return data, check


CASES = {'mmdet': detection, 'mmseg': segmentation, 'mmpretrain': classification}
