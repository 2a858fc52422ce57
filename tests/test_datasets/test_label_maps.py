"""Data sets of label maps: good data as with mmseg, and a message for each defect."""

import pickle
import sys

import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset as MMSegADE20KDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image
from small_data import (
    CONFIGS,
    HEIGHT,
    WIDTH,
    assert_stopped,
    columns,
    processes,
    trainings,
    write_image,
    write_label_maps,
    write_map,
)

from visionseq_mm.datasets import ADE20KDataset, LabelMapDataset
from visionseq_mm.registry import DATASETS

CONFIG = 'nano/upernet_vim-nano_1xb8-1k_camvid-160x160.py'
NAMES = 'sky', 'road', 'tree'


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    return caplog


def arguments(root, **changes):
    settings = dict(
        data_root=str(root),
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        metainfo=dict(classes=NAMES, palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]]),
        pipeline=[dict(type='LoadAnnotations')],
    )
    return {**settings, **changes}


def records(dataset):
    return [dataset.get_data_info(i) for i in range(len(dataset))]


def assert_words(caught, *words):
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_good_data_is_as_with_mmseg(tmp_path, log):
    settings = arguments(write_label_maps(tmp_path))
    ours, theirs = LabelMapDataset(**settings), BaseSegDataset(**settings)
    assert len(ours) == 2
    assert records(ours) == records(theirs)
    assert ours.metainfo == theirs.metainfo
    assert f'Checked 2 label maps in {tmp_path / "annotations/train"}' in log.text
    assert 'No label map' not in log.text


def test_ade20k_is_as_with_mmseg(tmp_path):
    """Without a look at the labels, here above the 150 classes."""
    settings = arguments(write_label_maps(tmp_path, labels=(200, 1)), metainfo=None)
    ours, theirs = ADE20KDataset(**settings), MMSegADE20KDataset(**settings)
    assert len(ours) == 2
    assert records(ours) == records(theirs)
    assert ours.metainfo == theirs.metainfo


def test_spawned_workers_get_it(tmp_path):
    dataset = LabelMapDataset(**arguments(write_label_maps(tmp_path)))
    assert records(pickle.loads(pickle.dumps(dataset))) == records(dataset)


def test_lazy(tmp_path):
    settings = arguments(tmp_path / 'elsewhere', lazy_init=True)
    assert LabelMapDataset(**settings).metainfo['classes'] == NAMES


def test_names():
    for dataset in (ADE20KDataset, LabelMapDataset):
        assert DATASETS.get(dataset.__name__) is dataset


@pytest.mark.parametrize('mode', ['P', 'I;16', '1'])
def test_other_kinds_of_png(mode, tmp_path):
    """Palette, 16 bits and one bit, as long as the labels are right."""
    root = write_label_maps(tmp_path)
    image = Image.fromarray(columns((0, 1), np.uint16 if mode == 'I;16' else np.uint8))
    if mode == 'P':
        image.putpalette([255, 0, 0, 0, 255, 0])
    elif mode == '1':
        image = Image.fromarray(columns((0, 1)) == 1)
    image.save(root / 'annotations' / 'train' / 'a.png')
    assert Image.open(root / 'annotations' / 'train' / 'a.png').mode == mode
    settings = arguments(root, pipeline=[dict(type='LoadAnnotations')])
    loaded = LabelMapDataset(**settings)[0]['gt_seg_map']
    assert (loaded == columns((0, 1))).all()


LABELS = {
    'out of range': ((0, 3, 7), {}, 'labels 3, 7', '0 to 2 for the 3'),
    '255 is a label when another is ignored': ((0, 255), dict(ignore_index=2), 'labels 255'),
    'zero is no class': ((0, 1, 4), dict(reduce_zero_label=True), 'labels 4', '1 to 3 for the 3'),
}


@pytest.mark.parametrize('case', LABELS)
def test_labels(case, tmp_path):
    labels, changes, *words = LABELS[case]
    root = write_label_maps(tmp_path)
    path = root / 'annotations' / 'train' / 'b.png'
    write_map(path, columns(labels))
    with pytest.raises(ValueError) as caught:
        LabelMapDataset(**arguments(root, **changes))
    bad = 2 if 'ignore_index' in changes else 1
    assert_words(caught, f'{bad} of 2 label maps in {path.parent}', f'{path}: ', *words)
    assert_words(caught, 'metainfo.classes', 'reduce_zero_label')


def test_labels_from_one(tmp_path):
    root = write_label_maps(tmp_path, labels=(0, 1, 2, 3, 255))
    assert len(LabelMapDataset(**arguments(root, reduce_zero_label=True))) == 2


@pytest.mark.parametrize(
    'array, words',
    [
        (columns((0, 1000), np.uint16), 'labels 1000'),
        (np.stack([columns((0, 1))] * 3, -1), '3 channels (RGB)'),
        (np.stack([columns((0, 1))] * 4, -1), '4 channels (RGBA)'),
        (columns((0, 1))[:, :-1], f'{WIDTH - 1} x {HEIGHT} pixels, the image {WIDTH} x {HEIGHT}'),
    ],
    ids=['16 bits', 'RGB', 'RGBA', 'size'],
)
def test_maps_of_another_kind(array, words, tmp_path):
    path = write_label_maps(tmp_path) / 'annotations' / 'train' / 'a.png'
    write_map(path, array)
    with pytest.raises(ValueError) as caught:
        LabelMapDataset(**arguments(tmp_path))
    assert_words(caught, '1 of 2 label maps', f'{path}: {words}', 'convert colours')


def test_damaged_file(tmp_path):
    path = write_label_maps(tmp_path) / 'annotations' / 'train' / 'a.png'
    path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / 'images' / 'train' / 'b.jpg').write_text('<html>')
    with pytest.raises(ValueError) as caught:
        LabelMapDataset(**arguments(tmp_path))
    assert_words(caught, '2 of 2 label maps', 'a.png: it or its image cannot be read')


def test_images_without_label_maps(tmp_path):
    """For predictions: a config's data_prefix merges with that of its base and keeps the maps'."""
    root = write_label_maps(tmp_path)
    for path in root.glob('annotations/train/*'):
        path.unlink()
    settings = arguments(root, test_mode=True, pipeline=[dict(type='LoadImageFromFile')])
    assert LabelMapDataset(**settings)[0]['img'].shape[:2] == (HEIGHT, WIDTH)


def test_photograph_on_its_side(tmp_path):
    """Its EXIF orientation turns it when it is read, and so its label map is upright."""
    root = write_label_maps(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (HEIGHT, WIDTH)).save(root / 'images' / 'train' / 'a.jpg', exif=exif)
    settings = arguments(
        root, pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    )
    assert LabelMapDataset(**settings)[0]['img'].shape[:2] == (HEIGHT, WIDTH)
    Image.new('RGB', (HEIGHT, WIDTH)).save(root / 'images' / 'train' / 'a.jpg')
    with pytest.raises(ValueError, match=r'a.png: 48 x 32 pixels, the image 32 x 48'):
        LabelMapDataset(**settings)


def test_class_that_never_occurs(tmp_path, log):
    """What a mask of 0 and 255, 255 for the object, would train without a word."""
    LabelMapDataset(**arguments(write_label_maps(tmp_path, labels=(0, 1, 255))))
    assert "has 'tree'" in log.text
    assert '255 means unlabelled' in log.text


def test_classes_of_a_subclass(tmp_path):
    """The files have all labels of METAINFO, whichever of them metainfo chooses."""

    class Streets(LabelMapDataset):
        METAINFO = dict(classes=NAMES, palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]])

    root = write_label_maps(tmp_path)
    dataset = Streets(**arguments(root, metainfo=dict(classes=('tree', 'sky'))))
    assert set(np.unique(dataset[0]['gt_seg_map'])) == {0, 1, 255}
    with pytest.raises(ValueError, match='is not a subset of classes'):
        Streets(**arguments(root, metainfo=dict(classes=('tree', 'car'))))


@pytest.mark.parametrize(
    'metainfo, error, words',
    [
        (None, ValueError, ['has no classes']),
        (dict(classes='sky'), TypeError, ["got 'sky'", "('cat',)"]),
        (dict(classes=('sky', 'sky')), ValueError, ["'sky' more than once"]),
        (dict(classes=NAMES, palette=[[0, 0, 0]]), ValueError, ['1 colours for 3 classes']),
        (dict(classes=NAMES, palette=[[0, 0, 0]] * 4), ValueError, ['palette does not match']),
    ],
)
def test_metainfo(metainfo, error, words, tmp_path):
    with pytest.raises(error) as caught:
        LabelMapDataset(**arguments(write_label_maps(tmp_path), metainfo=metainfo))
    assert_words(caught, *words)


def test_classes_from_a_file(tmp_path):
    """mmengine's other meaning of a string."""
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES))
    metainfo = dict(classes=str(tmp_path / 'names.txt'))
    dataset = LabelMapDataset(**arguments(write_label_maps(tmp_path), metainfo=metainfo))
    assert tuple(dataset.metainfo['classes']) == NAMES


@pytest.mark.parametrize('kind', [LabelMapDataset, ADE20KDataset])
def test_missing_folders_and_files(kind, tmp_path):
    root = write_label_maps(tmp_path)
    settings = arguments(root)
    if kind is ADE20KDataset:
        settings['metainfo'] = None
    for changes, what in (
        (dict(data_root=str(tmp_path / 'nowhere')), 'folder of images .*nowhere/images/train'),
        (dict(data_prefix=dict(img_path='photos')), 'folder of images .*photos'),
        (
            dict(data_prefix=dict(img_path='images/train', seg_map_path='labels')),
            'folder of label maps .*labels.*data_prefix.seg_map_path',
        ),
        (dict(ann_file='train.txt'), 'list of images .*train.txt'),
    ):
        pipeline = [] if 'photos' in what else settings['pipeline']
        with pytest.raises(FileNotFoundError, match=what + '.*set the environment variable'):
            kind(**{**settings, **changes, 'pipeline': pipeline})
    with pytest.raises(ValueError) as caught:
        kind(**settings, img_suffix='.JPG')
    assert_words(caught, "img_suffix is '.JPG'", "has 2 x '.jpg' (such as a.jpg, b.jpg)")
    with pytest.raises(FileNotFoundError) as caught:
        kind(**settings, seg_map_suffix='_L.png')
    words = '2 of 2 label maps', 'a_L.png', "seg_map_suffix='_L.png'", "2 x '.png' (such as a.png"
    assert_words(caught, *words, 'Correct seg_map_suffix')


def test_list_of_images_with_suffixes(tmp_path):
    root = write_label_maps(tmp_path)
    (root / 'train.txt').write_text('a\n')
    assert len(LabelMapDataset(**arguments(root, ann_file='train.txt'))) == 1
    (root / 'train.txt').write_text('a\nb.jpg\n')
    with pytest.raises(FileNotFoundError, match=r'1 of 2 images do not exist: .*b\.jpg\.jpg'):
        LabelMapDataset(**arguments(root, ann_file='train.txt'))


def test_without_label_maps(tmp_path):
    """To predict; LoadAnnotations would fail."""
    root = write_label_maps(tmp_path)
    settings = arguments(root, data_prefix=dict(img_path='images/train'))
    with pytest.raises(ValueError, match='leave LoadAnnotations out of the pipeline'):
        LabelMapDataset(**settings)
    settings.update(pipeline=[dict(type='LoadImageFromFile')], test_mode=True)
    assert len(LabelMapDataset(**settings)) == 2
    with pytest.raises(ValueError, match='data_prefix must be dict'):
        LabelMapDataset(**{**settings, 'data_prefix': dict(img_dir='images/train')})


SHARED = """
import os, sys
from mmengine.dist import init_dist
from mmengine.registry import init_default_scope
import torch.distributed as dist

dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=int(sys.argv[3]),
                        world_size=2)
init_default_scope('mmseg')
from visionseq_mm.datasets import LabelMapDataset
count = [0]
read = LabelMapDataset._read
def counted(*arguments):
    count[0] += 1
    return read(*arguments)
LabelMapDataset._read = counted
try:
    LabelMapDataset(data_root=sys.argv[1], metainfo=dict(classes=('sky', 'road', 'tree')),
                    data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'))
except ValueError as error:
    print('read', count[0], error)
"""


@pytest.mark.slow
def test_processes_share_the_reading(tmp_path):
    """All report what one of them has found."""
    from concurrent.futures import ThreadPoolExecutor

    root = write_label_maps(tmp_path)
    write_map(root / 'annotations' / 'train' / 'b.png', columns((0, 9)))
    command = sys.executable, '-W', 'ignore', '-c', SHARED, root, tmp_path / 'meeting'
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda rank: processes(*command, rank, cwd=tmp_path), range(2)))
    for output in outputs:
        assert 'read 1 1 of 2 label maps' in output, output
        assert 'b.png: labels 9' in output


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp('camvid')
    write_label_maps(root / 'good', labels=range(11))
    write_label_maps(root / 'labels', labels=range(12))
    path = write_label_maps(root / 'colours', labels=range(11)) / 'annotations' / 'train' / 'a.png'
    write_map(path, np.stack([columns((0, 1))] * 3, -1))
    path = write_label_maps(root / 'val', labels=range(11)) / 'annotations' / 'val' / 'a.png'
    write_map(path, columns((0, 11)))
    write_image(root / 'good' / 'images' / 'test' / 'a.jpg')
    return root


MESSAGES = {
    'names': (
        'ValueError',
        'model.decode_head.num_classes is 11, but train_dataloader.dataset has 12 classes',
    ),
    'folder': ('FileNotFoundError', 'folder of images', 'nowhere'),
    'labels': ('ValueError', '2 of 2 label maps', 'labels 11'),
    'format': ('ValueError', '1 of 2 label maps', '3 channels (RGB)'),
    'labels of the validation': ('ValueError', '1 of 2 label maps', 'annotations/val'),
}


def test_training_stops_with_the_message(roots, tmp_path):
    metainfo = 'train_dataloader.dataset.metainfo.'
    twelve = {metainfo + 'classes': tuple('abcdefghijkl'), metainfo + 'palette': []}
    cases = {
        'names': (roots / 'good', twelve),
        'folder': (roots / 'nowhere', {}),
        'labels': (roots / 'labels', {}),
        'format': (roots / 'colours', {}),
        'labels of the validation': (roots / 'val', {}),
        'nothing': (roots / 'good', {}),
    }
    outputs = trainings(CONFIG, 'CAMVID_ROOT', cases, cwd=tmp_path)
    assert 'Iter(train) [1/1]' in outputs.pop('nothing')
    for case, output in outputs.items():
        assert_stopped(output, *MESSAGES[case])


@pytest.mark.slow
@pytest.mark.parametrize('case', ['folder', 'labels', 'format'])
def test_mim_train_stops_with_the_message(case, roots, tmp_path):
    root = roots / dict(folder='nowhere', labels='labels', format='colours')[case]
    command = 'mim', 'train', 'mmsegmentation', CONFIGS / CONFIG, '--work-dir', 'work'
    output = processes(*command, cwd=tmp_path, CAMVID_ROOT=str(root))
    assert 'Iter(train)' not in output
    error, *words = MESSAGES[case]
    assert [word for word in (f'{error}: ', *words) if word not in output] == [], output[-4000:]
