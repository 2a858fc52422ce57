"""tools/infer.py: the pictures and JSON of all three toolboxes, and what it refuses."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from pycocotools import mask as coco_mask

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'
NANO = ROOT / 'configs' / 'nano'
SHAPES = {'ä ö.jpg': (48, 64), 'b.JPG': (48, 64), 'b.png': (64, 48)}

DETECTOR = f"""
_base_ = {str(NANO / 'mask-rcnn_vim-nano_1xb2-500_nuts-400x300.py')!r}
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=2), img_size=64),
    neck=dict(in_channels=32),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = (64, 64)
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
SEGMENTOR = f"""
_base_ = {str(NANO / 'upernet_vim-nano_1xb8-1k_camvid-160x160.py')!r}
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=4), img_size=64),
    neck=dict(in_channels=[32] * 4),
    decode_head=dict(in_channels=[32] * 4),
    auxiliary_head=dict(in_channels=32),
)
"""
CLASSIFIER = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['visionseq_mm.registry'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='visionseq_mm.Vim', arch=dict(embed_dims=32, depth=2), img_size=64, out_type='cls'
    ),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
)
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
test_dataloader = dict(
    dataset=dict(
        type='CustomDataset',
        data_root='.',
        metainfo=dict(classes=('cat', 'dog', 'gnu')),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 64)),
            dict(type='PackInputs'),
        ],
    )
)
"""


@pytest.fixture(scope='module', autouse=True)
def _threads(one_thread):
    pass


@pytest.fixture
def infer(monkeypatch):
    """Runs the tool in this process."""
    monkeypatch.syspath_prepend(TOOLS)
    main = runpy.run_path(str(TOOLS / 'infer.py'))['main']
    yield lambda *arguments: main([str(argument) for argument in arguments])
    del sys.modules['_toolbox']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """pictures/, and a config with a checkpoint of random weights for each toolbox."""
    place = tmp_path_factory.mktemp('infer')
    random = np.random.default_rng(0)
    (place / 'pictures').mkdir()
    for name, shape in SHAPES.items():
        pixels = random.integers(256, size=(*shape, 3), dtype=np.uint8)
        assert cv2.imwrite(str(place / 'pictures' / name), pixels)
    (place / 'pictures' / 'notes.txt').write_text('No picture.')
    for name, text in dict(detector=DETECTOR, segmentor=SEGMENTOR, classifier=CLASSIFIER).items():
        (place / f'{name}.py').write_text(text)
        save(place, name)
    return place


def save(place, name, **meta):
    cfg = Config.fromfile(place / f'{name}.py')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        weights = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=weights, meta=meta), place / f'{name}.pth')


def files(place, name):
    return place / f'{name}.py', place / f'{name}.pth'


def results(folder, suffix='.json'):
    return {
        path.name.removesuffix(suffix): json.loads(path.read_text(encoding='utf-8'))
        for path in (folder / 'preds').glob(f'*{suffix}')
    }


def test_detector(infer, place, tmp_path):
    """With the checkpoint's class names, which are not those of the config."""
    from mmdet.apis import DetInferencer

    names = 'walnut', 'äpple', 'pear'
    save(place, 'detector', dataset_meta=dict(classes=names))
    pictures = place / 'pictures'
    infer(pictures, *files(place, 'detector'), '--out-dir', tmp_path, '--score-thr', 1)
    found = results(tmp_path)
    assert set(found) == {'ä ö', 'b.JPG', 'b.png'}
    assert {path.name for path in (tmp_path / 'vis').iterdir()} == set(SHAPES)

    inferencer = DetInferencer(*map(str, files(place, 'detector')), show_progress=False)
    for one in found.values():
        height, width = SHAPES[one['image']]
        assert len(one['scores']) == 5
        assert one['names'] == [names[label] for label in one['labels']]
        assert all(coco_mask.decode(mask).shape == (height, width) for mask in one['masks'])
        (direct,) = inferencer(str(pictures / one['image']))['predictions']
        assert direct == {key: one[key] for key in one.keys() - {'image', 'names'}}

    original, blank = (
        cv2.imread(str(folder / 'b.png')) for folder in (pictures, tmp_path / 'vis')
    )
    assert (original == blank).all()  # nothing is surer than 1
    infer(pictures, *files(place, 'detector'), '--out-dir', tmp_path, '--score-thr', 0)
    assert (original != cv2.imread(str(tmp_path / 'vis' / 'b.png'))).any()
    assert results(tmp_path) == found


def test_segmentor(place, tmp_path):
    """As a process in a foreign folder, on batches; names and colours are those of the config."""
    command = sys.executable, TOOLS / 'infer.py', place / 'pictures', *files(place, 'segmentor')
    subprocess.run(
        [*command, '--batch-size', '2', '--device', 'cpu'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    found = results(tmp_path / 'outputs')
    assert set(found) == {'ä ö', 'b.JPG', 'b.png'}
    meta = Config.fromfile(place / 'segmentor.py').metainfo
    for one in found.values():
        path = tmp_path / 'outputs' / 'preds' / one['label_map']
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert labels.shape == SHAPES[one['image']]
        shares = {entry['label']: entry['share'] for entry in one['classes']}
        assert shares == {label: (labels == label).mean() for label in np.unique(labels)}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert all(entry['name'] == meta.classes[entry['label']] for entry in one['classes'])

    drawn = cv2.imread(str(tmp_path / 'outputs' / 'vis' / 'b.png')).astype(float)
    original = cv2.imread(str(place / 'pictures' / 'b.png'))
    labels = cv2.imread(str(tmp_path / 'outputs' / 'preds' / 'b.png.png'), cv2.IMREAD_UNCHANGED)
    coloured = 0.2 * original + 0.8 * np.array(meta.palette)[labels][..., ::-1]
    right = (abs(drawn - coloured) <= 1).all(axis=-1)
    assert right.mean() > 0.5, 'other colours'  # there are names on the rest


def test_classifier(infer, place, tmp_path):
    save(place, 'classifier', dataset_meta=dict(classes=['cat', 'dog', 'gnü']))
    flags = '--batch-size', 3, '--out-dir', tmp_path
    infer(place / 'pictures', *files(place, 'classifier'), *flags)
    found = results(tmp_path)
    assert {path.name for path in (tmp_path / 'vis').iterdir()} == set(SHAPES)
    assert {one['image'] for one in found.values()} == set(SHAPES)
    for one in found.values():
        best = one['top5']
        assert {entry['name']: entry['label'] for entry in best} == dict(cat=0, dog=1, gnü=2)
        assert sum(entry['score'] for entry in best) == pytest.approx(1)
        assert one['score'] == max(entry['score'] for entry in best)
        assert {key: one[key] for key in ('label', 'name', 'score')} == best[0]

    only = place / 'pictures' / 'b.png'
    infer(only, *files(place, 'classifier'), '--out-dir', tmp_path / 'one')
    assert results(tmp_path / 'one')['b']['score'] == pytest.approx(found['b.png']['score'])


def test_results_of_one_stem_have_names_of_their_own(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    name = runpy.run_path(str(TOOLS / 'infer.py'))['result_names']
    pictures = [Path(text) for text in ('a.jpg', 'a.png', 'a.jpg.bmp', 'b.c.jpg')]
    assert list(name(pictures).values()) == ['a.jpg', 'a.png', 'a.jpg.bmp', 'b.c']


@pytest.mark.parametrize(
    ('name', 'content'), [('x.jpg', b''), ('y.png', b'\x89PNG\r\n\x1a\n'), ('z.bmp', b'<html>')]
)
def test_unreadable_picture(infer, place, tmp_path, name, content):
    shutil.copy(place / 'pictures' / 'b.png', tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=rf'Cannot be read as pictures: [^/]*: \S*/{name}$'):
        infer(tmp_path, *files(place, 'segmentor'), '--out-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (['--score-thr', '0.5'], '--score-thr is for detectors; .* is for mmseg'),
        (['--device', 'hal9000'], '--device hal9000 cannot be used here'),
        (['--cfg-options', 'default_scope=mmpose'], "default_scope = 'mmpose'"),
    ],
)
def test_refused_flags(infer, place, tmp_path, flags, said):
    with pytest.raises(SystemExit, match=said):
        infer(
            place / 'pictures', *files(place, 'segmentor'), '--out-dir', tmp_path / 'out', *flags
        )
    assert not (tmp_path / 'out').exists()


def test_no_such_picture(infer, place, tmp_path):
    with pytest.raises(SystemExit, match='nowhere: no such picture or folder'):
        infer(tmp_path / 'nowhere', *files(place, 'segmentor'))


def test_folder_without_pictures(infer, place, tmp_path):
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(SystemExit, match=r'has no pictures.*\.jpg, \.jpeg, \.png.*\.webp'):
        infer(tmp_path, *files(place, 'segmentor'))


@pytest.mark.parametrize(
    ('content', 'said'), [(None, 'lost.pth: no such checkpoint'), (b'', r'lost.pth.* is empty')]
)
def test_no_checkpoint(infer, place, tmp_path, content, said):
    lost = tmp_path / 'lost.pth'
    if content is not None:
        lost.write_bytes(content)
    with pytest.raises(SystemExit, match=said):
        infer(place / 'pictures', place / 'segmentor.py', lost, '--out-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (
            ['model.decode_head.num_classes=3'],
            'is of another model.*: 2 of .* such as decode_head.conv_seg.weight',
        ),
        (['model.backbone.arch.depth=5'], 'does not fit the backbone Vim'),
    ],
)
def test_checkpoint_of_another_config(infer, place, tmp_path, options, said):
    flags = '--out-dir', tmp_path / 'out', '--cfg-options', *options
    with pytest.raises(SystemExit, match=said):
        infer(place / 'pictures', *files(place, 'segmentor'), *flags)
    assert not (tmp_path / 'out').exists()
