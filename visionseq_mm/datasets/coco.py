"""mmdet's data set in COCO's format, which says what is wrong with the data."""

import json
import logging
import math
from collections import Counter

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine import fileio
from mmengine.logging import print_log

from visionseq_mm.datasets.checks import NamedClasses, check_path, missing_files, some
from visionseq_mm.registry import DATASETS

FORMAT = (
    "COCO's format for instances is an object with three lists: images of {id, file_name, "
    'height, width}, categories of {id, name}, and annotations of {id, image_id, category_id, '
    'bbox: [x, y, width, height] in pixels, area, iscrowd: 0 or 1, segmentation}.'
)
FIELDS = dict(
    images=['id', 'file_name', 'height', 'width'],
    categories=['id', 'name'],
    annotations=['id', 'image_id', 'category_id', 'bbox', 'area'],
)
#: Keys that give other formats away.
OTHER_FORMATS = {
    'shapes': "LabelMe's file of one image",
    '_via_img_metadata': 'a project of the VGG Image Annotator',
    'regions': 'annotations of the VGG Image Annotator',
    'score': 'the results of a detector',
}


@DATASETS.register_module()
class CocoDataset(NamedClasses, MMDetCocoDataset):
    """mmdet's CocoDataset, with its arguments, which checks the data when it is built.

    ``metainfo.classes`` must have the order of the file's categories: mmdet
    numbers the labels in the order of the file, and takes the names for these
    numbers from ``classes``.

    Raises:
        FileNotFoundError: The annotation file, the folder of images or images are missing.
        TypeError: ``metainfo.classes`` is one name instead of a tuple.
        ValueError: The file is in another format or contradicts itself, ``metainfo.classes``
            does not fit it, or nothing is left to train with.
    """

    def load_data_list(self):
        if 'img' not in self.data_prefix:
            raise ValueError(
                "data_prefix must be dict(img='...'), the folder of images below data_root, got "
                f'{self.data_prefix}.'
            )
        storage = self.backend_args
        check_path('annotation file', self.ann_file, 'ann_file', storage, fileio.isfile)
        check_path('folder of images', self.data_prefix['img'], 'data_prefix.img', storage)
        return super().load_data_list()

    def COCOAPI(self, path):
        """What mmdet reads the annotation file with; here checked before it is indexed."""
        try:
            with open(path) as file:
                content = json.load(file)
        except ValueError as error:  # of JSON, or of the text's encoding
            with open(path, 'rb') as file:
                head = file.read(60)
            raise ValueError(
                f'{self.ann_file} is not JSON: {error}. It begins with {head!r}. {FORMAT}'
            ) from None
        self._check_format(content)
        self._check_categories([category['name'] for category in content['categories']])
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
        return coco

    def _check_format(self, content):
        fields = dict(FIELDS)
        if self.test_mode:  # COCO's evaluation wants iscrowd; files of test images lack the list
            fields['annotations'] = [*fields['annotations'], 'iscrowd']
            if isinstance(content, dict) and 'annotations' not in content:
                del fields['annotations']
        if not isinstance(content, dict) or not all(
            isinstance(content.get(name), list) for name in fields
        ):
            raise ValueError(f'{self.ann_file} holds {_describe(content)}. {FORMAT}')

        def refuse(name, is_wrong, problem):
            wrong = [item for item in content[name] if is_wrong(item)]
            if wrong:
                raise ValueError(
                    f'In {self.ann_file}, {len(wrong)} of {len(content[name])} {name} {problem}; '
                    f'the first is {_brief(wrong[0])}. {FORMAT}'
                )

        for name, keys in fields.items():
            is_incomplete = _lacks(set(keys))
            refuse(name, is_incomplete, f'lack one of the keys {", ".join(keys)}')
            for key in ('id', 'name') if name == 'categories' else ('id',):
                is_repeated = _is_repeated(key, content[name])
                refuse(name, is_repeated, f'have the {key} of another one')
        refuse('images', _has_odd_size, 'have a height or width that is no number')
        if content.get('annotations'):
            self._check_annotations(content, refuse)

    def _check_annotations(self, content, refuse):
        annotations = content['annotations']

        def warn(number, problem):
            if number:
                print_log(
                    f'{self.ann_file}: {number} of {len(annotations)} annotations {problem}.',
                    logger='current',
                    level=logging.WARNING,
                )

        problem = 'have a bbox that is not a list of four numbers, or an area that is no number'
        refuse('annotations', _has_odd_box, problem)
        is_stray = _is_stray('category_id', content['categories'])
        refuse('annotations', is_stray, 'have an unknown category_id, no id in categories')
        is_stray = _is_stray('image_id', content['images'])
        stray = sum(map(is_stray, annotations))
        if stray == len(annotations):
            refuse('annotations', is_stray, 'have an unknown image_id, no id in images')
        warn(stray, 'are ignored, because their image_id is no id in images')
        exceeds = _exceeds(content['images'])
        outside = sum(map(exceeds, annotations))
        if 2 * outside > len(annotations):
            problem = 'have a bbox beyond the image; are its last two numbers a corner?'
            refuse('annotations', exceeds, problem)
        warn(outside, 'have a bbox beyond the image, which is cut off')
        if self._loads_masks():
            problem = (
                'have a segmentation that is neither polygons, [[x1, y1, x2, y2, ...], ...], '
            )
            refuse('annotations', _has_odd_polygons, f'{problem}nor RLE, {{size, counts}}')
            degenerate = sum(map(_is_degenerate, annotations))
            if degenerate == len(annotations):
                refuse('annotations', _is_degenerate, 'have no polygon of three corners or more')
            warn(degenerate, 'are ignored, because they have no polygon of three corners or more')

    def _loads_masks(self):
        return any(getattr(t, 'with_mask', False) for t in self.pipeline.transforms)

    def _check_categories(self, names):
        classes = tuple(self.metainfo['classes'])
        unknown = [name for name in classes if name not in names]
        if unknown:
            default = classes == self.METAINFO['classes']
            raise ValueError(
                f'metainfo.classes names {some(map(repr, unknown))}'
                f'{" (the classes of COCO are the default)" if default else ""}, but the '
                f'categories of {self.ann_file} are {some(map(repr, names), 100)}. Correct '
                'metainfo.classes, and num_classes of the heads where their number changes.'
            )
        chosen = tuple(name for name in names if name in classes)
        if chosen != classes:
            raise ValueError(
                f'metainfo.classes has another order than the categories of {self.ann_file}, by '
                f'which mmdet numbers the labels. Write classes={chosen!r}, and the palette in '
                'that order.'
            )
        ignored = [name for name in names if name not in classes]
        if ignored:
            print_log(
                f'{self.ann_file}: annotations of {some(map(repr, ignored), 20)} are ignored, '
                'because metainfo.classes does not name these categories.',
                logger='current',
                level=logging.WARNING,
            )

    def filter_data(self):
        kept = super().filter_data()
        if not kept:
            raise ValueError(
                f'{self.ann_file} leaves no image of {len(self.data_list)} to use. '
                f'filter_cfg={self.filter_cfg} leaves out small images (min_size) and images '
                f'without annotations of {some(self.metainfo["classes"], 20)} (filter_empty_gt).'
            )
        missing = missing_files((image['img_path'] for image in kept), self.backend_args)
        if missing:
            raise FileNotFoundError(
                f'{len(missing)} of {len(kept)} images of {self.ann_file} do not exist: '
                f'{some(missing)}. Their path is data_root, data_prefix.img and file_name, joined.'
            )
        if not self.test_mode and not any(image['instances'] for image in kept):
            raise ValueError(
                f'No annotation of {self.ann_file} can be used: mmdet leaves out those outside '
                'the image, without area, with ignore set, or with a bbox less than one pixel '
                'wide or high. Fractions of the image size must be multiplied by it.'
            )
        if self._loads_masks():
            bare = [i['img_path'] for i in kept if any('mask' not in j for j in i['instances'])]
            if bare:
                raise ValueError(
                    f'{len(bare)} of {len(kept)} images of {self.ann_file} have annotations '
                    f'without segmentation: {some(bare)}. Add polygons or RLE, or use a detector '
                    'without masks: then the pipeline says with_mask=False.'
                )
        return kept


def _describe(content):
    """What an annotation file holds, in words."""
    entries = list(content.values()) if isinstance(content, dict) else content
    first = entries[0] if isinstance(entries, list) and entries else None
    keys = [k for level in (content, first) if isinstance(level, dict) for k in level]
    guess = next((f' ({name}?)' for key, name in OTHER_FORMATS.items() if key in keys), '')
    if isinstance(content, dict):
        return f'an object with the keys {some(map(repr, content), 10)}{guess}'
    if isinstance(content, list):
        return f'a list of {len(content)} entries, the first {repr(first)[:200]}{guess}'
    return f'only {repr(content)[:200]}'


def _lacks(keys):
    return lambda item: not isinstance(item, dict) or not item.keys() >= keys


def _is_repeated(key, items):
    counts = Counter(item[key] for item in items)
    return lambda item: counts[item[key]] > 1


def _is_stray(key, items):
    ids = {item['id'] for item in items}
    return lambda item: item[key] not in ids


def _has_odd_size(image):
    return not {type(image['height']), type(image['width'])} <= {int, float}


def _has_odd_box(annotation):
    box = annotation['bbox']
    if not isinstance(box, list) or len(box) != 4:
        return True
    numbers = annotation['area'], *box
    return not {*map(type, numbers)} <= {int, float} or not all(map(math.isfinite, numbers))


def _exceeds(images, tolerance=2):
    """Whether a bbox goes beyond its image by more pixels than rounding explains."""
    sizes = {image['id']: (image['width'], image['height']) for image in images}

    def check(annotation):
        width, height = sizes.get(annotation['image_id'], (math.inf, math.inf))
        x, y, w, h = annotation['bbox']
        return x + w > width + tolerance or y + h > height + tolerance

    return check


def _has_odd_polygons(annotation):
    found = annotation.get('segmentation', [])
    if isinstance(found, dict):
        return not found.keys() >= {'size', 'counts'}
    return not isinstance(found, list) or not all(
        isinstance(polygon, list) and {*map(type, polygon)} <= {int, float} for polygon in found
    )


def _is_degenerate(annotation):
    """What mmdet ignores: no list of at least three pairs."""
    found = annotation.get('segmentation')
    return isinstance(found, list) and not any(len(p) >= 6 and len(p) % 2 == 0 for p in found)


def _brief(item):
    """An entry as text; the polygons, long and often the first key, would hide the rest."""
    if isinstance(item, dict) and 'segmentation' in item:
        item = dict(item)
        item['segmentation'] = item.pop('segmentation')
    return repr(item)[:200]
