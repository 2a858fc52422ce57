"""What the data sets of detection and of segmentation check alike."""

import os
from collections import Counter

from mmengine import fileio

MOVE = (
    "Correct data_root and {arguments} in the config or, where the config's data_root is "
    "'{{{{$NAME:default}}}}', set the environment variable NAME to the folder of the data."
)


def some(items, count=5):
    """The first ``count`` of ``items`` as text, and how many more there are."""
    items = list(items)
    more = f' and {len(items) - count} more' if len(items) > count else ''
    return ', '.join(map(str, items[:count])) + more


class NamedClasses:
    """Before a data set among the bases: ``metainfo`` must name the classes and fit itself."""

    @classmethod
    def _load_metainfo(cls, metainfo=None):
        loaded = super()._load_metainfo(metainfo)
        classes = loaded.get('classes')
        if not classes:
            raise ValueError(
                f'{cls.__name__} has no classes. Give it metainfo=dict(classes=(...)) with their '
                'names, in the order of the labels.'
            )
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(
                f'metainfo.classes must be a tuple of names, got {classes!r}. A single name '
                "needs a comma: classes=('cat',)."
            )
        repeated = [name for name, count in Counter(classes).items() if count > 1]
        if repeated:
            raise ValueError(f'metainfo.classes has {some(map(repr, repeated))} more than once.')
        palette = loaded.get('palette') or ()
        # mmdet's has the 80 colours of COCO, of which fewer may be used.
        if not isinstance(palette, str) and 0 < len(palette) < len(classes):
            raise ValueError(
                f'metainfo.palette has {len(palette)} colours for {len(classes)} classes: give '
                'one (red, green, blue) for each class, in the same order. A palette may come '
                "from the base's metainfo, with which this one merges."
            )
        return loaded


def has_folders(path, backend_args):
    """Whether the storage of ``path`` has folders to look into; LMDB and HTTP have none."""
    return hasattr(fileio.get_file_backend(path, backend_args=backend_args), 'list_dir_or_file')


def check_path(what, path, arguments, backend_args, is_there=fileio.isdir):
    """Refuse a path that is not there.

    Args:
        what (str): What it should be, for the message.
        path (str): As joined with data_root.
        arguments (str): Which arguments of the data set it comes from.
        backend_args (dict | None): Of the data set.
        is_there: ``isdir`` or ``isfile`` of mmengine's fileio.

    Raises:
        FileNotFoundError: There is no such folder or file.
    """
    there = path or os.curdir
    if has_folders(there, backend_args) and not is_there(there, backend_args=backend_args):
        raise FileNotFoundError(
            f'The {what} {path!r} does not exist (searched from {os.getcwd()}). '
            + MOVE.format(arguments=arguments)
        )


def missing_files(paths, backend_args):
    """Those of ``paths`` that do not exist; folders are listed, which is quick in all storages."""
    paths = list(paths)
    if not paths or not has_folders(paths[0], backend_args):
        return []
    there = set()
    for folder in {os.path.dirname(path) for path in paths}:
        if fileio.isdir(folder, backend_args=backend_args):
            names = fileio.list_dir_or_file(folder, list_dir=False, backend_args=backend_args)
            there.update(os.path.join(folder, name) for name in names)
    # A listing may lack hidden files.
    return [
        path
        for path in paths
        if path not in there and not fileio.exists(path, backend_args=backend_args)
    ]
