"""Every config: what it says, and one training step and one prediction of its model."""

import ast
import importlib
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(CONFIGS.rglob('*.py'))
PATHS = [path for path in FILES if '_base_' not in path.parts]

#: {config: parameters of its model}
PARAMETERS = {
    'mask-rcnn_vim-nano_1xb2-500_nuts-400x300': 1_814_586,
    'upernet_secvit-nano_1xb8-1k_camvid-160x160': 1_209_558,
    'upernet_vil-nano_1xb8-1k_camvid-160x160': 1_284_374,
    'upernet_vim-nano_1xb8-1k_camvid-160x160': 1_243_414,
}

BATCH, HEIGHT, WIDTH = 2, 96, 128

every_config = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)


def test_every_config_has_its_number_of_parameters():
    assert sorted(PARAMETERS) == sorted(path.stem for path in PATHS)


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
    cfg = Config.fromfile(path)
    assert cfg.default_scope in ('mmdet', 'mmseg', 'mmpretrain')
    assert 'visionseq_mm.registry' in cfg.custom_imports.imports
    assert cfg.custom_imports.allow_failed_imports is False


@every_config
def test_data_root(path, monkeypatch, tmp_path):
    """An environment variable moves all paths, with a slash at its end or without."""
    # The text is that of the file and its bases, before the replacement.
    roots = set(re.findall(r'\{\{\$(\w+):(.*?)\}\}', Config.fromfile(path).text))
    assert len(roots) == 1, f'one {{{{$VARIABLE:default}}}} is expected, not {roots}'
    variable, default = roots.pop()
    monkeypatch.delenv(variable, raising=False)
    before = {
        key: text
        for key, text in strings(Config.fromfile(path).to_dict())
        if text.startswith(default)
    }
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
def test_model(path):
    """Numbers of classes agree, a step reaches all parameters, predictions have their form."""
    torch.manual_seed(0)
    cfg = Config.fromfile(path)
    cfg.model.backbone.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        registry = importlib.import_module(f'{cfg.default_scope}.registry')
        model = registry.MODELS.build(cfg.model)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS.get(path.stem)
        model.init_weights()
        model = revert_sync_batchnorm(model)
        dataset = cfg.train_dataloader.dataset
        metainfo = dataset.get('metainfo') or registry.DATASETS.get(dataset.type).METAINFO
        num_classes = len(metainfo['classes'])
        assert set(named(cfg.model.to_dict(), 'num_classes')) == {num_classes}
        data, check = CASES[cfg.default_scope](num_classes)
        train_step(model, cfg.optim_wrapper, data)
        check(model.eval().test_step(data))


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
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    assert loss.isfinite()
    optim_wrapper.backward(loss)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trainable.items() if p.grad is None]
    assert not [name for name, p in trainable.items() if not p.grad.isfinite().all()]
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optim_wrapper.step()
    assert any((p != before[name]).any() for name, p in trainable.items())


def detection(num_classes):
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
            assert found.masks.shape == (len(found), HEIGHT, WIDTH)

    return data, check


def segmentation(num_classes):
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


CASES = {'mmdet': detection, 'mmseg': segmentation}
