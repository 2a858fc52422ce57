"""mmseg's data sets of images and label maps, which say what is wrong with the data."""

import logging
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from mmengine import fileio
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.logging import print_log
from mmseg.datasets import ADE20KDataset as MMSegADE20KDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image

from visionseq_mm.datasets.checks import (
    NamedClasses,
    check_path,
    has_folders,
    missing_files,
    some,
)
from visionseq_mm.registry import DATASETS

ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)  # of EXIF: rows are columns


class CheckedFolders(NamedClasses):
    """Before :class:`BaseSegDataset`: folders and files are checked when built."""

    @property
    def has_label_maps(self):
        """Whether there must be some: not for predictions, whose pipeline does not read them."""
        transforms = self.pipeline.transforms
        reads = any(getattr(transform, 'with_seg', False) for transform in transforms)
        return reads or ('seg_map_path' in self.data_prefix and not transforms)

    def load_data_list(self):
        images, label_maps = (self.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
        if images is None or (self.has_label_maps and label_maps is None):
            raise ValueError(
                'data_prefix must be dict(img_path=..., seg_map_path=...), the folders of images '
                f'and of label maps below data_root, got {self.data_prefix}. Without label maps, '
                'leave LoadAnnotations out of the pipeline.'
            )
        storage = self.backend_args
        if self.ann_file:
            check_path('list of images', self.ann_file, 'ann_file', storage, fileio.exists)
        check_path('folder of images', images, 'data_prefix.img_path', storage)
        if self.has_label_maps:
            check_path('folder of label maps', label_maps, 'data_prefix.seg_map_path', storage)
        data_list = super().load_data_list()
        if not data_list:
            raise ValueError(
                f'No image in {self.ann_file or images}: img_suffix is {self.img_suffix!r}, and '
                f'{images} has {_suffixes(images, storage)}.'
            )
        files = {'img_path': 'images', 'seg_map_path': 'label maps'}
        for key, what in list(files.items())[: 1 + self.has_label_maps]:
            missing = missing_files((item[key] for item in data_list), storage)
            if missing:
                folder, suffix = self.data_prefix[key], key.replace('path', 'suffix')
                raise FileNotFoundError(
                    f'{len(missing)} of {len(data_list)} {what} do not exist: {some(missing)}. '
                    f'An image and its label map have the same name up to img_suffix='
                    f'{self.img_suffix!r} and seg_map_suffix={self.seg_map_suffix!r}; {folder} '
                    f'has {_suffixes(folder, storage)}. Correct {suffix}, or add the files.'
                )
        return data_list


@DATASETS.register_module()
class ADE20KDataset(CheckedFolders, MMSegADE20KDataset):
    """mmseg's ADE20KDataset, with its arguments, which checks folders and files when built.

    Raises:
        FileNotFoundError: Folders or files are missing.
        TypeError: ``metainfo.classes`` is one name instead of a tuple.
        ValueError: No image is found.
    """


@DATASETS.register_module()
class LabelMapDataset(CheckedFolders, BaseSegDataset):
    """Images and PNG label maps of class indices, checked when it is built.

    A label map has one channel, the size of its image, and the index of the
    class at each pixel: 0 to n - 1 in the order of ``metainfo.classes``, and
    ``ignore_index`` (255) where nothing is labelled. With
    ``reduce_zero_label``, 1 to n, and 0 too means unlabelled.

    All label maps are read for that, some hundreds a second; mmseg's own
    BaseSegDataset, whose arguments this has, takes them as they are.

    Raises:
        FileNotFoundError: Folders or files are missing.
        TypeError: ``metainfo.classes`` is one name instead of a tuple.
        ValueError: No image is found, classes and palette differ in number, or label maps are
            not as above.
    """

    def load_data_list(self):
        data_list = super().load_data_list()
        if self.has_label_maps:
            self._check_labels(data_list)
        return data_list

    def _check_labels(self, data_list):
        start = time.time()
        rank, world_size = get_dist_info()
        with ThreadPoolExecutor() as pool:  # each process of a distributed training takes a part
            found = list(pool.map(self._read, data_list[rank::world_size]))
        found = list(chain.from_iterable(all_gather_object(found)))
        # A subclass that defines classes may use some of them only; the files have all.
        classes = self.METAINFO.get('classes') or self.metainfo['classes']
        first = int(self.reduce_zero_label)
        allowed = {*range(len(classes) + first), self.ignore_index}
        problems, seen = [], set()
        for path, problem, labels in found:
            seen |= labels
            if labels - allowed:
                problem = f'labels {some(sorted(labels - allowed), 10)}'
            if problem:
                problems.append(f'{path}: {problem}')
        folder = self.data_prefix['seg_map_path']
        if problems:
            raise ValueError(
                f'{len(problems)} of {len(found)} label maps in {folder} cannot be used:\n  '
                + '\n  '.join(sorted(problems)[:5])
                + f'\nA label map has one channel, the size of its image, and at each pixel the '
                f'index of a class, {first} to {len(classes) - 1 + first} for the {len(classes)} '
                f'of metainfo.classes, or {self.ignore_index} where nothing is labelled. Name all '
                'classes in metainfo.classes (and set num_classes of the heads to their number); '
                'set reduce_zero_label=True if the labels count from 1 and 0 is unlabelled; '
                'convert colours to class indices.'
            )
        print_log(
            f'Checked {len(found)} label maps in {folder}: {time.time() - start:.1f} s.',
            logger='current',
        )
        unseen = [name for label, name in enumerate(classes, first) if label not in seen]
        if unseen:
            print_log(
                f'No label map in {folder} has {some(map(repr, unseen), 20)}. In a mask of 0 and '
                '255, 255 means unlabelled; the label of the second class is 1.',
                logger='current',
                level=logging.WARNING,
            )

    def _read(self, item):
        """(path, what is wrong or None, set of labels) of one label map."""
        path, storage = item['seg_map_path'], self.backend_args
        try:
            with (
                fileio.get_local_path(item['img_path'], backend_args=storage) as local,
                Image.open(local) as image,
            ):
                size = image.size
                if image.getexif().get(ORIENTATION) in TRANSPOSED:
                    size = size[::-1]
            with (
                fileio.get_local_path(path, backend_args=storage) as local,
                Image.open(local) as image,
            ):
                if len(image.getbands()) > 1:
                    return path, f'{len(image.getbands())} channels ({image.mode})', set()
                if image.size != size:
                    sizes = ' x '.join(map(str, image.size)), ' x '.join(map(str, size))
                    return path, f'{sizes[0]} pixels, the image {sizes[1]}', set()
                return path, None, set(np.unique(np.asarray(image)).tolist())
        except (OSError, SyntaxError) as error:
            return path, f'it or its image cannot be read: {error}', set()


def _suffixes(folder, storage):
    """How many files with which suffix a folder has, in words."""
    if not has_folders(folder, storage):
        return 'files that cannot be listed'
    names = fileio.list_dir_or_file(folder, list_dir=False, recursive=True, backend_args=storage)
    names = list(names)
    counts = Counter(os.path.splitext(name)[1] for name in names).most_common()
    kinds = some(f'{count} x {suffix!r}' for suffix, count in counts)
    return f'{kinds} (such as {some(sorted(names), 3)})' if names else 'no files'
