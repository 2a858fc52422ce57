"""Turns an official checkpoint into a file of bare tensors in this package's names.

The checkpoint must fit as a whole. What is written:

    {'state_dict': {name: tensor}, 'meta': {'name', 'source', 'sha256', 'weights', 'task'}}

where `weights` says which entry of the source was taken (model, model_ema, state_dict; None: it
had no entries). torch.load reads it with weights_only=True and nothing else allowed.
"""

import argparse
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine.runner import CheckpointLoader

from visionseq_mm.checkpoints import PUBLISHED, convert, find_published, weights_key
from visionseq_mm.registry import MODELS


def local_path(source):
    """Where the file of a path, an URL or a visionseq:// name lies once it was loaded."""
    if source.startswith('visionseq://'):
        source = find_published(source).url
    if '://' not in source:
        return Path(source).expanduser()
    return Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(source).path))


def build_backbone(name, out_type):
    """The backbone of a published name, or of its settings as JSON."""
    if not name.startswith('{'):
        return MODELS.build(dict(find_published(name).backbone, out_type=out_type))
    try:
        return MODELS.build(dict(out_type=out_type, **json.loads(name)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'the backbone {name} cannot be built: {error}. Give its type and arguments as JSON, '
            'but no out_type, which --task sets.'
        ) from error


def convert_file(name, source, target, task):
    """Reads `source`, which `name` describes, and writes `target`."""
    backbone = build_backbone(name, out_type='cls' if task == 'cls' else 'featmap')
    checkpoint = CheckpointLoader.load_checkpoint(source, map_location='cpu')
    tensors = convert(backbone, checkpoint)
    path = local_path(source)
    meta = dict(
        name=name,
        source=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        weights=weights_key(checkpoint, backbone.prefer_ema()),
        task=task,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=tensors, meta=meta), target)
    print(f'{target}: {len(tensors)} tensors of {meta["source"]} ({meta["weights"] or "bare"})')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'name',
        help='what the source holds: the backbone as JSON, as in \'{"type": "visionseq_mm.Vim", '
        f'"arch": "tiny", "img_size": 384}}\', or one of {", ".join(PUBLISHED)}',
    )
    parser.add_argument('source', help='path, URL or visionseq://NAME of the checkpoint')
    parser.add_argument('target', type=Path, help='file to write; must not exist')
    parser.add_argument(
        '--task',
        choices=['dense', 'cls'],
        default='dense',
        help="dense: the backbone alone, for its init_cfg; cls: with the head, for mmpretrain's "
        'ImageClassifier and --checkpoint (default: dense)',
    )
    args = parser.parse_args(arguments)
    if args.target.exists():
        parser.error(f'{args.target} exists')
    try:
        convert_file(args.name, args.source, args.target, args.task)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
    main()
