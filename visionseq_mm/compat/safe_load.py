"""Checkpoints load with ``weights_only=True``, and say what is wrong when they do not.

torch's restricted unpickler builds nothing but the types it knows.
:func:`install` adds the few that mmengine's files and the official Vim and
SecViT files need, and makes mmengine's loaders use it for downloads as well.
"""

import argparse
import contextlib
import os
import pickle
import re
import zipfile
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint

_STATISTICS = ('min', 'max', 'current', 'mean')


class CheckpointError(RuntimeError):
    """A checkpoint file is empty, cut off, damaged or something else than a checkpoint."""


def restricted_getattr(owner, name):
    """What a pickle gets as ``builtins.getattr``: the public statistics of HistoryBuffer.

    mmengine pickles them with every HistoryBuffer. The real ``getattr`` would lead from any
    allowed class to its module, and from there to everything.

    Raises:
        pickle.UnpicklingError: for any other object or name.
    """
    if owner is HistoryBuffer and type(name) is str and name in _STATISTICS:
        return getattr(owner, name)
    allowed = ', '.join(f'HistoryBuffer.{name}' for name in _STATISTICS)
    raise pickle.UnpicklingError(f'its pickle uses getattr for something else than {allowed}')


def _safe_globals() -> list:
    reconstruct, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    renamed = [  # files from numpy 1 say numpy.core
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for core in ('core', '_core')
        for function in (reconstruct, scalar)
    ]
    dtypes = [type(np.dtype(code)) for code in '?bBhHiIlLqQefdg']
    return [
        HistoryBuffer,
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        *dtypes,
        *renamed,
        (restricted_getattr, 'builtins.getattr'),
    ]


def _damage(path: str, error: Exception) -> str | None:
    """What is wrong with the file that made torch raise ``error``; None: nothing is."""
    size = os.path.getsize(path)
    if not size:
        return 'it is empty'
    with open(path, 'rb') as file:
        head = file.read(200)
    if head.startswith(b'PK') and not zipfile.is_zipfile(path):
        return f'it is a zip archive cut off after {size} bytes'
    if not re.match(rb'PK|\x80[\x02-\x05]', head):
        text = ' '.join(head.decode(errors='replace').split())
        if text.startswith('<'):
            return f'it is a web page of {size} bytes that begins {text[:80]!r}'
        if text.isprintable() and '\ufffd' not in text:
            return f'it is a text of {size} bytes that begins {text[:80]!r}'
        return f'its {size} bytes are not in a format that torch.save writes'
    # RuntimeErrors are about devices or memory, unless they say otherwise.
    elsewhere = isinstance(error, pickle.UnpicklingError | RuntimeError | OSError | MemoryError)
    about_file = 'PytorchStreamReader|archive|unexpected EOF|magic number'
    if not elsewhere or re.search(about_file, str(error)):
        reason = f'{type(error).__name__}: {error}'
        return f'its {size} bytes are damaged or no checkpoint ({reason[:100]})'
    return None


def _refusal(error: pickle.UnpicklingError) -> str:
    """torch's reason, without its advice to turn the protection off."""
    message = str(error)
    asked = re.search(r'GLOBAL (\S+)', message)
    # Otherwise the reason is the paragraph before the last, which refers to the documentation.
    return f'its pickle asks for {asked[1]}' if asked else message.split('\n\n')[-2:][0]


@contextlib.contextmanager
def _explained(path: str, url: str | None = None):
    """Turn torch's errors about the file ``path`` into ours; remove a bad download."""
    try:
        yield
    except Exception as error:
        damage = os.path.isfile(path) and _damage(path, error)
        if not damage and not isinstance(error, pickle.UnpicklingError):
            raise
        origin = ''
        if url:
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.remove(path)
            origin = f' It came from {url}; the cached copy has been removed.'
        # `from None`, because torch's own message advises to turn the protection off.
        if damage:
            raise CheckpointError(
                f'Cannot load checkpoint {path}: {damage}.{origin} Copy or download it again, in '
                'a browser if the site asks for a login, and compare its size with the original.'
            ) from None
        raise pickle.UnpicklingError(
            f'Refused to load checkpoint {path}: {_refusal(error)}.{origin} A pickle can run any '
            'code, so only tensors, plain data and a few known classes are allowed, and nothing '
            'else was run. Ask the author for the bare state_dict. If you know what the class '
            'does and trust the file, allow that one class with '
            'torch.serialization.add_safe_globals.'
        ) from None


def load_file(path: str | os.PathLike, map_location=None):
    """Read a checkpoint file with ``torch.load(..., weights_only=True)``.

    Args:
        path: a local file; ``~`` is the home directory.
        map_location: as in :func:`torch.load`.

    Returns:
        What the file holds, usually a dict.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, cut off, damaged or no checkpoint, a saved login
            page for example.
        pickle.UnpicklingError: the file asks for something that might run code.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'Checkpoint {path} does not exist or is not a file (searched from {os.getcwd()}).'
        )
    with _explained(path):
        return torch.load(path, map_location=map_location, weights_only=True)


def load_from_local(filename, map_location=None):
    """Loader of local paths for mmengine's ``CheckpointLoader``: see :func:`load_file`."""
    return load_file(filename, map_location)


def _load_url(url, map_location, model_dir, progress):
    model_dir = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    name = os.path.basename(urlparse(url).path)
    try:
        with _explained(os.path.join(model_dir, name), url):
            return torch.hub.load_state_dict_from_url(
                url,
                model_dir=model_dir,
                map_location=map_location,
                progress=progress,
                file_name=name,
                weights_only=True,
            )
    except OSError as error:
        raise OSError(
            f'Cannot download checkpoint {url}: {error}. Check the address and the connection, '
            'or download it in a browser and give the path of the file.'
        ) from error


def load_from_http(filename, map_location=None, model_dir=None, progress=None):
    """Loader of ``http(s)://`` for mmengine's ``CheckpointLoader``.

    Rank 0 downloads into torch hub's cache, then the other ranks read from there. A file that
    cannot be used is removed from the cache.

    Args:
        filename: the URL.
        map_location: as in :func:`torch.load`.
        model_dir: folder for the download; None: ``checkpoints`` in ``torch.hub.get_dir()``.
        progress: show a progress bar; None: on a terminal.

    Raises:
        OSError: the download failed.
        CheckpointError: what came is no checkpoint, or cut off.
        pickle.UnpicklingError: the file asks for something that might run code.
    """
    if progress is None:
        progress = os.isatty(2)
    rank, _ = get_dist_info()
    try:
        if rank == 0:
            return _load_url(filename, map_location, model_dir, progress)
    finally:
        barrier()  # after an error too: the others would wait for ever
    return _load_url(filename, map_location, model_dir, progress)


def install() -> None:
    """Allow the globals of mmengine's and the official files; replace mmengine's loaders.

    Local paths and ``http(s)://`` go through this module, and so do ``torchvision://``,
    ``open-mmlab://`` and ``mmcls://``, which call mmengine's function for downloads by name.
    Calling it again changes nothing.
    """
    torch.serialization.add_safe_globals(_safe_globals())
    register = mmengine_checkpoint.CheckpointLoader.register_scheme
    register(prefixes='', loader=load_from_local, force=True)
    register(prefixes=('http://', 'https://'), loader=load_from_http, force=True)
    mmengine_checkpoint.load_from_http = load_from_http
