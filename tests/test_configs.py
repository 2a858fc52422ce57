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

#: {config: parameters of its model}. That of vim-tiny at 1024x1024 is what the log of Vim's
#: authors counts, 12,901,100, but for the final norm of 192, which dense features do not use.
PARAMETERS = {
    'cascade-mask-rcnn_secvit-tiny_fpn_ms-3x_coco': 66_510_654,
    'cascade-mask-rcnn_vil-nano_1xb2-500_nuts-400x300': 3_776_328,
    'cascade-mask-rcnn_vil-tiny_sfp_8xb8-lsj-100e_coco-1024x1024': 64_419_630,
    'cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e_coco-1024x1024': 65_368_686,
    'mask-rcnn_sec-fastervit-tiny_fpn_1x_coco': 43_276_720,
    'mask-rcnn_sec-swin-tiny_fpn_1x_coco': 47_771_280,
    'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128': 1_798_056,
    'mask-rcnn_secvit-tiny_fpn_1x_coco': 33_582_384,
    'mask-rcnn_vil-tiny_sfp_1x_coco-1024x1024': 28_865_824,
    'mask-rcnn_vim-nano_1xb2-500_nuts-400x300': 1_814_586,
    'mask-rcnn_vim-tiny_sfp_1x_coco-1024x1024': 29_814_880,
    'mask-rcnn_vim-tiny_sfp_120e_nuts-1024x1024': 29_400_466,
    'retinanet_secvit-nano_1xb2-500_nuts-400x300': 1_051_071,
    'retinanet_secvit-tiny_fpn_1x_coco': 23_664_820,
    'retinanet_vil-tiny_sfp_1x_coco-1024x1024': 15_186_644,
    'retinanet_vil-tiny_sfp_120e_nuts-1024x1024': 13_589_279,
    'retinanet_vim-tiny_sfp_1x_coco-1024x1024': 16_135_700,
    'upernet_sec-fastervit-tiny_4xb4-160k_ade20k-512x512': 53_433_324,
    'upernet_sec-swin-tiny_4xb4-160k_ade20k-512x512': 59_918_540,
    'upernet_secvit-nano_1xb8-1k_camvid-160x160': 1_209_558,
    'upernet_secvit-tiny_4xb4-160k_ade20k-512x512': 43_738_988,
    'upernet_secvit-tiny_8xb2-160k_ade20k-1024x1024': 43_738_988,
    'upernet_vil-nano_1xb8-1k_camvid-160x160': 1_284_374,
    'upernet_vil-tiny_4xb4-160k_ade20k-512x512': 11_241_708,
    'upernet_vil-tiny_8xb2-160k_ade20k-1024x1024': 11_831_532,
    'upernet_vim-nano_1xb8-1k_camvid-160x160': 1_243_414,
    'upernet_vim-nano_1xb8-300_shapes-128x128': 1_239_178,
    'upernet_vim-tiny_4xb4-160k_ade20k-512x512': 12_311_084,
    'upernet_vim-tiny_4xb4-20k_camvid-512x512': 12_248_534,
    'upernet_vim-tiny_8xb2-160k_ade20k-1024x1024': 12_900_908,
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
    roots = dict(re.findall(r'\{\{\$(\w+):(.*?)\}\}', Config.fromfile(path).text))
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
def test_model(path):
    """Numbers of classes agree, a step reaches all parameters, predictions have their form."""
    torch.manual_seed(0)
    cfg = Config.fromfile(path)
    cfg.model.backbone.pop('init_cfg', None)
    make_small(cfg)
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
        data, check = CASES[cfg.default_scope](model, num_classes)
        train_step(model, cfg.optim_wrapper, data)
        check(model.eval().test_step(data))


def make_small(cfg):
    """No padding to 1024x1024, few boxes, and no score is too low for an untrained model."""
    model = cfg.model
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (HEIGHT, WIDTH)
        return
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
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
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


CASES = {'mmdet': detection, 'mmseg': segmentation}
