"""visionseq_mm.CocoDataset: good data as with mmdet, and a message for each defect."""

import contextlib
import json
import math
import pickle
import subprocess
import sys

import forks
import pytest
from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmengine import fileio
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import init_default_scope
from small_data import CONFIGS, NAMES, assert_stopped, instances, processes, trainings, write_coco

from visionseq_mm.datasets import CocoDataset
from visionseq_mm.registry import DATASETS

CONFIG = 'nano/mask-rcnn_vim-nano_1xb2-500_nuts-400x300.py'
WITH_MASKS = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def arguments(root, **changes):
    settings = dict(
        data_root=str(root),
        ann_file='trainval.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=NAMES),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=WITH_MASKS,
    )
    return {**settings, **changes}


def records(dataset):
    return [dataset.get_data_info(i) for i in range(len(dataset))]


@pytest.mark.parametrize('test_mode', [False, True])
def test_good_data_is_as_with_mmdet(tmp_path, test_mode):
    settings = arguments(write_coco(tmp_path), test_mode=test_mode)
    ours, theirs = CocoDataset(**settings), MMDetCocoDataset(**settings)
    assert len(ours) == 2
    assert records(ours) == records(theirs)
    assert ours.metainfo == theirs.metainfo
    assert ours.cat_img_map == theirs.cat_img_map


def test_spawned_workers_get_it(tmp_path):
    dataset = CocoDataset(**arguments(write_coco(tmp_path)))
    assert records(pickle.loads(pickle.dumps(dataset))) == records(dataset)


def test_in_a_wrapper(tmp_path):
    inner = dict(type='visionseq_mm.CocoDataset', **arguments(write_coco(tmp_path)))
    outer = MMENGINE_DATASETS.build(dict(type='RepeatDataset', times=3, dataset=inner))
    assert len(outer) == 6
    assert outer.metainfo['classes'] == NAMES


def test_lazy(tmp_path):
    """Inferencers read the metainfo of a data set that is somewhere else."""
    settings = arguments(tmp_path / 'elsewhere', lazy_init=True)
    assert CocoDataset(**settings).metainfo['classes'] == NAMES


def test_images_of_a_test_set_have_no_annotations(tmp_path):
    content = instances()
    del content['annotations']
    write_coco(tmp_path, content)
    assert len(CocoDataset(**arguments(tmp_path, test_mode=True))) == 2
    with pytest.raises(ValueError, match='three lists'):
        CocoDataset(**arguments(tmp_path))


def test_category_that_is_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    dataset = CocoDataset(**arguments(write_coco(tmp_path), metainfo=dict(classes=NAMES[:2])))
    assert "annotations of 'hazelnut' are ignored" in caplog.text
    found = [
        instance['bbox_label'] for record in records(dataset) for instance in record['instances']
    ]
    assert sorted(found) == [0, 0, 1, 1]


def test_palette_of_fewer_classes(tmp_path):
    """Which mmdet would refuse when it draws."""
    metainfo = dict(classes=NAMES, palette=[(0, 0, 0), (9, 9, 9)])
    with pytest.raises(ValueError, match='palette has 2 colours for 3 classes'):
        CocoDataset(**arguments(write_coco(tmp_path), metainfo=metainfo))


def test_annotation_of_another_image(tmp_path, caplog, monkeypatch):
    """As when the list of images was cut; mmdet ignores it, too."""
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    content = instances()
    content['images'].pop()
    dataset = CocoDataset(**arguments(write_coco(tmp_path, content)))
    assert '3 of 6 annotations are ignored' in caplog.text
    assert len(dataset) == 1


def test_image_that_is_filtered_may_be_missing(tmp_path):
    content = instances()
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] == 1]
    write_coco(tmp_path, content)
    (tmp_path / 'images' / '2.jpg').unlink()
    assert len(CocoDataset(**arguments(tmp_path))) == 1
    with pytest.raises(FileNotFoundError, match=r'1 of 2 images'):
        CocoDataset(**arguments(tmp_path, filter_cfg=None))


def test_hidden_file_and_folder_in_file_name(tmp_path):
    content = instances()
    for image, name in zip(content['images'], ('.1.jpg', 'more/2.jpg'), strict=True):
        image['file_name'] = name
    images = write_coco(tmp_path, content) / 'images'
    (images / 'more').mkdir()
    (images / '1.jpg').rename(images / '.1.jpg')
    (images / '2.jpg').rename(images / 'more' / '2.jpg')
    assert len(CocoDataset(**arguments(tmp_path))) == 2


CLASSES = {
    'one name': ('fig', TypeError, ["got 'fig'", "classes=('cat',)"]),
    'no name': ((), ValueError, ['has no classes']),
    'numbers': ((1, 2), TypeError, ['tuple of names', '(1, 2)']),
    'twice': (('fig', 'fig'), ValueError, ["'fig' more than once"]),
    'unknown': (('date', 'Fig'), ValueError, ["names 'Fig'", "are 'date', 'fig', 'hazelnut'"]),
    'other order': (
        ('fig', 'date', 'hazelnut'),
        ValueError,
        ['another order', "classes=('date', 'fig', 'hazelnut')"],
    ),
}


@pytest.mark.parametrize('case', CLASSES)
def test_classes(case, tmp_path):
    classes, error, words = CLASSES[case]
    with pytest.raises(error) as caught:
        CocoDataset(**arguments(write_coco(tmp_path), metainfo=dict(classes=classes)))
    assert_words(caught, words)


def assert_words(caught, words):
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_classes_default_to_those_of_coco(tmp_path):
    with pytest.raises(ValueError, match=r"'person', .* and 75 more \(the classes of COCO are"):
        CocoDataset(**arguments(write_coco(tmp_path), metainfo=None))


def test_mmdet_numbers_labels_by_the_file(tmp_path):
    """Why the order of ``classes`` is not left to the user."""
    settings = arguments(write_coco(tmp_path), metainfo=dict(classes=NAMES[::-1]))
    ((first, *_), *_) = (record['instances'] for record in records(MMDetCocoDataset(**settings)))
    assert settings['metainfo']['classes'][first['bbox_label']] != 'fig'
    assert instances()['annotations'][1]['category_id'] == 2  # the first of image 2: a fig


LABELME = dict(version='5.0', shapes=[], imagePath='1.jpg')
VIA_FILE = dict(filename='1.jpg', regions=[], size=1)
RESULT = dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1], score=0.5)
FORMATS = {
    'empty': ('', ['is not JSON', "begins with b''"]),
    'text': ('1.jpg 0 0 10 10 1', ['is not JSON', "b'1.jpg 0 0"]),
    'xml': ('<annotation></annotation>', ['is not JSON', "b'<annotation>"]),
    'cut off': ('{"images": [', ['is not JSON', 'line 1 column 13']),
    'labelme': (LABELME, ["the keys 'version', 'shapes', 'imagePath'", "(LabelMe's file"]),
    'via': ({'1.jpg1': VIA_FILE}, ["the keys '1.jpg1'", '(annotations of the VGG']),
    'via project': ({'_via_settings': {}, '_via_img_metadata': {}}, ['(a project of the VGG']),
    'results': ([RESULT], ['a list of 1 entries', '(the results of a detector?)']),
    'number': (3, ['holds only 3']),
    'no lists': (dict(images={}, annotations={}, categories={}), ['an object with the keys']),
}


@pytest.mark.parametrize('case', FORMATS)
def test_other_formats(case, tmp_path):
    content, words = FORMATS[case]
    root = write_coco(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        CocoDataset(**arguments(root))
    assert_words(caught, [str(root / 'trainval.json'), *words, 'images of {id, file_name'])


def test_annotations_that_are_no_text(tmp_path):
    (write_coco(tmp_path) / 'trainval.json').write_bytes(pickle.dumps([1]) + b'\xff')
    with pytest.raises(ValueError, match='is not JSON'):
        CocoDataset(**arguments(tmp_path))


def spoil(kind, index, **changes):
    """Instances with changes in one entry; None takes the key away."""

    def content():
        content = instances()
        entry = content[kind][index]
        entry.update(changes)
        for key in [key for key, value in entry.items() if value is None]:
            del entry[key]
        return content

    return content


def with_a_number_for_an_entry():
    content = instances()
    content['categories'][1] = 5
    return content


ENTRIES = {
    **{
        f'image without {key}': (spoil('images', 1, **{key: None}), ['1 of 2 images lack one of'])
        for key in ('id', 'file_name', 'height', 'width')
    },
    **{
        f'annotation without {key}': (
            spoil('annotations', 2, **{key: None}),
            ['1 of 6 annotations lack one of', key],
        )
        for key in ('id', 'image_id', 'category_id', 'bbox', 'area')
    },
    'category without name': (
        spoil('categories', 0, name=None),
        ['1 of 3 categories lack one of', "the first is {'id': 1}"],
    ),
    'image twice': (spoil('images', 1, id=1), ['2 of 2 images have the id of another']),
    'annotation twice': (
        spoil('annotations', 1, id=0),
        ['2 of 6 annotations have the id of another'],
    ),
    'category twice': (
        spoil('categories', 1, name='date'),
        ['2 of 3 categories have the name of another'],
    ),
    'unknown category': (
        spoil('annotations', 3, category_id=0),
        [
            '1 of 6 annotations have an unknown category_id, no id in categories',
            "the first is {'id': 3",
        ],
    ),
    'three corners': (spoil('annotations', 3, bbox=[1, 2, 3]), ['a list of four numbers']),
    'size of text': (spoil('images', 0, width='48'), ['1 of 2 images have a height or width']),
    'area of text': (spoil('annotations', 3, area='320'), ['an area that is no number']),
    'no entry': (with_a_number_for_an_entry, ['1 of 3 categories lack one of', 'the first is 5']),
    'box of text': (spoil('annotations', 3, bbox=['1'] * 4), ['a list of four numbers']),
    'box of nothing': (spoil('annotations', 3, bbox=[1, 2, 3, math.nan]), ['of four numbers']),
    'corners for points': (
        spoil('annotations', 3, segmentation=[[[4, 6], [24, 6], [24, 22]]]),
        [
            '1 of 6 annotations have a segmentation that is neither polygons',
            "'segmentation': [[[4",
        ],
    ),
    'flat polygon': (spoil('annotations', 3, segmentation=[4, 6, 24, 6, 24, 22]), ['neither']),
    'polygon of text': (spoil('annotations', 3, segmentation='4 6 24 6 24 22'), ['neither']),
    'half an RLE': (spoil('annotations', 3, segmentation=dict(counts='a')), ['nor RLE']),
    'no segmentation': (
        spoil('annotations', 3, segmentation=None),
        ['1 of 2 images', 'without segmentation: ', '2.jpg', 'with_mask=False'],
    ),
}


@pytest.mark.parametrize('case', ENTRIES)
def test_entries(case, tmp_path):
    content, words = ENTRIES[case]
    root = write_coco(tmp_path, content())
    with pytest.raises(ValueError) as caught:
        CocoDataset(**arguments(root))
    assert_words(caught, [str(root / 'trainval.json'), *words])


#: What all annotations have alike.
ALL = {
    'corners': (dict(bbox=[25, 20, 45, 30]), ['6 of 6', 'beyond the image', 'a corner?']),
    'lines': (dict(segmentation=[[4, 6, 24, 6]]), ['6 of 6', 'no polygon of three corners']),
    'images by name': (dict(image_id='1.jpg'), ['6 of 6', 'an unknown image_id']),
}


@pytest.mark.parametrize('case', ALL)
def test_all_annotations_alike(case, tmp_path):
    changes, words = ALL[case]
    content = instances()
    for entry in content['annotations']:
        entry.update(changes)
    with pytest.raises(ValueError) as caught:
        CocoDataset(**arguments(write_coco(tmp_path, content)))
    assert_words(caught, words)


def test_few_odd_annotations_are_let_through(tmp_path, caplog, monkeypatch):
    """As mmdet does; the log tells."""
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    content = instances()
    content['annotations'][0]['bbox'] = [25, 20, 45, 30]
    content['annotations'][1]['segmentation'] = [[4, 6, 24, 6]]
    assert len(CocoDataset(**arguments(write_coco(tmp_path, content)))) == 2
    assert '1 of 6 annotations have a bbox beyond the image' in caplog.text
    assert '1 of 6 annotations are ignored, because they have no polygon' in caplog.text


def test_polygons_do_not_hide_the_entry(tmp_path):
    """COCO's own files have them first."""
    content = instances()
    polygons = dict(segmentation=[list(range(1000))])
    content['annotations'] = [
        {**polygons, **entry, **polygons} for entry in content['annotations']
    ]
    content['annotations'][3]['category_id'] = 7
    with pytest.raises(ValueError, match=r"the first is {'id': 3, .*'category_id': 7"):
        CocoDataset(**arguments(write_coco(tmp_path, content)))


def test_absolute_file_names(tmp_path):
    """Without data_root and folder."""
    content = instances()
    for image in content['images']:
        image['file_name'] = str(tmp_path / 'images' / image['file_name'])
    file = write_coco(tmp_path, content) / 'trainval.json'
    settings = arguments(None, data_root='', ann_file=str(file), data_prefix=dict(img=''))
    assert len(CocoDataset(**settings)) == 2


def test_without_masks_no_segmentation_is_needed(tmp_path):
    root = write_coco(tmp_path, spoil('annotations', 3, segmentation=None)())
    assert len(CocoDataset(**arguments(root, pipeline=[]))) == 2


def test_iscrowd_is_needed_to_evaluate(tmp_path):
    root = write_coco(tmp_path, spoil('annotations', 3, iscrowd=None)())
    assert len(CocoDataset(**arguments(root))) == 2
    with pytest.raises(ValueError, match=r'lack one of the keys .*, iscrowd; the first'):
        CocoDataset(**arguments(root, test_mode=True))


def test_boxes_in_fractions(tmp_path):
    content = instances()
    for annotation in content['annotations']:
        annotation.update(bbox=[0.1, 0.1, 0.5, 0.5])
    with pytest.raises(ValueError, match=r'No annotation .* can be used'):
        CocoDataset(**arguments(write_coco(tmp_path, content)))


def test_nothing_is_left(tmp_path):
    root = write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"no image of 2 to use.*'min_size': 1000"):
        CocoDataset(**arguments(root, filter_cfg=dict(min_size=1000)))


def test_missing_paths(tmp_path):
    root = write_coco(tmp_path / 'data')
    hint = "correct data_root and {} in the config.*'{{{{\\$NAME:default}}}}', set the environment"
    for changes, what in (
        (dict(ann_file='train.json'), 'annotation file .*train.json'),
        (dict(data_root=str(tmp_path / 'nowhere')), 'annotation file .*nowhere/trainval.json'),
        (dict(data_prefix=dict(img='photos')), 'folder of images .*photos'),
    ):
        key = 'data_prefix.img' if 'data_prefix' in changes else 'ann_file'
        with pytest.raises(FileNotFoundError, match='(?i)' + what + '.*' + hint.format(key)):
            CocoDataset(**arguments(root, **changes))
    with pytest.raises(ValueError, match=r"data_prefix must be dict\(img='...'\)"):
        CocoDataset(**arguments(root, data_prefix=dict(img_path='images')))
    (root / 'images' / '2.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 2 images .* do not exist: .*2.jpg'):
        CocoDataset(**arguments(root))


def test_many_missing_files_are_counted(tmp_path):
    content = instances()
    content['images'] = [dict(content['images'][0], id=i, file_name=f'{i}.jpg') for i in range(9)]
    root = write_coco(tmp_path, content)
    with pytest.raises(FileNotFoundError, match=r'7 of 9 images.* and 2 more'):
        CocoDataset(**arguments(root, filter_cfg=None))


class Bare(BaseStorageBackend):
    """Storage without folders."""

    def get(self, filepath):
        raise NotImplementedError

    get_text = get

    def get_local_path(self, filepath):
        return contextlib.nullcontext(filepath)


def test_storage_without_folders(tmp_path):
    """It cannot say what is missing, and need not."""
    fileio.register_backend('bare', Bare, force=True)
    root = write_coco(tmp_path)
    (root / 'images' / '2.jpg').unlink()
    assert len(CocoDataset(**arguments(root, backend_args=dict(backend='bare')))) == 2


WITHOUT = """
import importlib.util as util, json, sys
find_spec = util.find_spec
util.find_spec = lambda name, *rest: None if name in ('mmdet', 'mmseg') else find_spec(name, *rest)
from mmengine.registry import DATASETS
messages = {}
for name in ('CocoDataset', 'ADE20KDataset', 'LabelMapDataset'):
    try:
        DATASETS.build(dict(type=f'visionseq_mm.{name}', data_root='data'))
    except ImportError as error:
        messages[name] = str(error)
assert 'mmdet' not in sys.modules and 'mmseg' not in sys.modules
print(json.dumps(messages))
"""


def test_toolbox_that_is_not_installed():
    done = subprocess.run([sys.executable, '-c', WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout.splitlines()[-1])
    assert set(messages) == {'CocoDataset', 'ADE20KDataset', 'LabelMapDataset'}
    assert 'visionseq_mm.CocoDataset needs mmdet' in messages['CocoDataset']
    assert 'pip install mmsegmentation' in messages['LabelMapDataset']


def test_registered_name():
    assert DATASETS.get('CocoDataset') is CocoDataset


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp('nuts')
    good = write_coco(root / 'good')
    (good / 'labelme.json').write_text(json.dumps(LABELME))
    write_coco(root / 'labelme', LABELME)
    write_coco(root / 'category', spoil('annotations', 3, category_id=9)())
    return root


MESSAGES = {
    'names': ('ValueError', "names 'walnut'", "are 'date', 'fig', 'hazelnut'"),
    'folder': ('FileNotFoundError', 'annotation file', 'nowhere'),
    'labels': ('ValueError', 'an unknown category_id, no id in categories'),
    'format': ('ValueError', 'LabelMe', "COCO's format"),
    'format of the validation': ('ValueError', 'labelme.json holds', "COCO's format"),
}


def test_training_stops_with_the_message(roots, tmp_path):
    classes = {'train_dataloader.dataset.metainfo.classes': ('date', 'fig', 'walnut')}
    other = {
        'val_dataloader.dataset.ann_file': 'labelme.json',
        'val_evaluator.ann_file': str(roots / 'good' / 'labelme.json'),
    }
    cases = {
        'names': (roots / 'good', classes),
        'folder': (roots / 'nowhere', {}),
        'labels': (roots / 'category', {}),
        'format': (roots / 'labelme', {}),
        'format of the validation': (roots / 'good', other),
        'nothing': (roots / 'good', {}),
    }
    outputs = trainings(CONFIG, 'NUTS_ROOT', cases, cwd=tmp_path)
    assert 'Iter(train) [1/1]' in outputs.pop('nothing')
    for case, output in outputs.items():
        assert_stopped(output, *MESSAGES[case])


@pytest.mark.slow
@pytest.mark.parametrize('case', ['folder', 'labels', 'format'])
def test_mim_train_stops_with_the_message(case, roots, tmp_path):
    root = roots / dict(folder='nowhere', labels='category', format='labelme')[case]
    command = 'mim', 'train', forks.MMDET, CONFIGS / CONFIG, '--work-dir', 'work'
    output = processes(*command, cwd=tmp_path, NUTS_ROOT=str(root))
    assert 'Iter(train)' not in output
    error, *words = MESSAGES[case]
    assert [word for word in (f'{error}: ', *words) if word not in output] == [], output[-4000:]
