"""Predictions of a detector, segmentor or classifier on a picture, or on those of a folder.

By the toolbox's own inferencer, which the config's default_scope names. For a picture a.jpg,
OUT_DIR/vis/a.jpg has them drawn in and OUT_DIR/preds/a.json lists them; a segmentor's label map
is OUT_DIR/preds/a.png. What is there already is overwritten. docs/inference.md shows the files.
"""

import argparse
import itertools
import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from _toolbox import read_config
from mmengine.config import DictAction
from mmengine.device import get_device
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import CheckpointLoader
from rich.progress import track

import visionseq_mm.registry  # noqa: F401, makes mmengine's checkpoints loadable
from visionseq_mm.checkpoints import CheckpointMismatchError

# What DetInferencer looks for in a folder.
SUFFIXES = '.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp'


# --- input ---------------------------------------------------------------------------------------


def find_pictures(place):
    """``place``, or the pictures in it if it is a folder."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        sys.exit(f'{place}: no such picture or folder (searched from {Path.cwd()}).')
    pictures = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if not pictures:
        sys.exit(
            f'{place} has no pictures: looked for files in it, not in folders below, whose names '
            f'end in {", ".join(SUFFIXES)}.'
        )
    return pictures


def shape_of(picture):
    """(height, width) of ``picture``, or None if it cannot be read."""
    try:
        return mmcv.imread(picture).shape[:2]
    except (cv2.error, OSError, AttributeError):  # mmcv gives None for what is no picture
        return None


def read_shapes(pictures):
    """{picture: (height, width)}; exits if some cannot be read, and names them."""
    shapes = {picture: shape_of(picture) for picture in track(pictures, 'Looking at the pictures')}
    unreadable = [str(picture) for picture, shape in shapes.items() if shape is None]
    if unreadable:
        sys.exit(
            'Cannot be read as pictures: damaged, empty, or of another format than their names '
            f'say; repair them or take them away: {", ".join(unreadable)}'
        )
    return shapes


def make_batches(shapes, size):
    """Lists of up to ``size`` pictures of one shape; mmseg stacks no others."""
    for _, group in itertools.groupby(sorted(shapes, key=shapes.get), key=shapes.get):
        while batch := list(itertools.islice(group, size)):
            yield batch


def result_names(pictures):
    """{picture: name of its results without suffix}: its stem, where that is no other's."""
    taken = Counter(name for path in pictures for name in {path.stem, path.name})
    return {path: path.stem if taken[path.stem] == 1 else path.name for path in pictures}


def read_checkpoint(checkpoint):
    """What the file holds; exits if it is not there or no checkpoint."""
    if '://' not in checkpoint and not Path(checkpoint).is_file():
        sys.exit(f'{checkpoint}: no such checkpoint (searched from {Path.cwd()}).')
    try:
        return CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f'{checkpoint}: {error}')


def read_dataset_meta(cfg, checkpoint):
    """Names and colours of the classes, from the checkpoint or else from the test data's config.

    The inferencers would take those of COCO and Cityscapes where the checkpoint has none.
    """
    meta = checkpoint.get('meta', {})
    if 'dataset_meta' in meta:
        return {key.lower(): value for key, value in meta['dataset_meta'].items()}
    return DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo


def refuse_other_model(model, checkpoint, path):
    """Exits where ``checkpoint`` is of another model; mmengine would log that and go on.

    Backbones check what they load themselves, as they take official names and sizes.
    """
    weights = checkpoint.get('state_dict', checkpoint)
    shapes = {
        name.removeprefix('module.'): tensor.shape
        for name, tensor in weights.items()
        if isinstance(tensor, torch.Tensor)
    }
    parameters = [pair for pair in model.named_parameters() if not pair[0].startswith('backbone.')]
    lost = [name for name, tensor in parameters if shapes.get(name) != tensor.shape]
    if lost:
        sys.exit(
            f'{path} is of another model than the config: {len(lost)} of {len(parameters)} '
            f'tensors of neck and heads are not in it or have another shape, such as {lost[0]}. '
            'Give the config that it was trained with.'
        )


# --- one inferencer for each toolbox -------------------------------------------------------------
# Each takes (cfg, checkpoint, device, meta, out_dir, score_thr) and returns the model with a
# function, which takes pictures, writes vis/, and yields (content of the JSON, label map or None).


def detector(cfg, checkpoint, device, meta, out_dir, score_thr):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(cfg, checkpoint, device=device, show_progress=False)
    meta = {**inferencer.model.dataset_meta, **meta}
    inferencer.model.dataset_meta = inferencer.visualizer.dataset_meta = meta

    def predict(pictures):
        found = inferencer(
            list(map(str, pictures)),
            batch_size=len(pictures),
            pred_score_thr=score_thr,
            out_dir=str(out_dir),
        )['predictions']
        for one in found:
            yield dict(names=[meta['classes'][label] for label in one['labels']], **one), None

    return inferencer.model, predict


def segmentor(cfg, checkpoint, device, meta, out_dir, score_thr):
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(cfg, checkpoint, device=device)
    inferencer.show_progress = False
    inferencer.model.dataset_meta = {key: meta.get(key) for key in ('classes', 'palette')}

    def predict(pictures):
        samples = inferencer(
            list(map(str, pictures)),
            batch_size=len(pictures),
            return_datasamples=True,
            out_dir=str(out_dir),
        )
        for sample in samples if len(pictures) > 1 else [samples]:
            label_map = sample.pred_sem_seg.data[0].cpu().numpy()
            labels, pixels = np.unique(label_map, return_counts=True)
            found = [
                dict(label=label, name=meta['classes'][label], share=count / label_map.size)
                for label, count in zip(labels.tolist(), pixels.tolist(), strict=True)
            ]
            yield dict(classes=sorted(found, key=lambda one: -one['share'])), label_map

    return inferencer.model, predict


def classifier(cfg, checkpoint, device, meta, out_dir, score_thr):
    from mmpretrain import ImageClassificationInferencer
    from mmpretrain.utils import progress
    from mmpretrain.visualization import UniversalVisualizer

    progress.disable_progress_bar = True
    classes = meta['classes']
    inferencer = ImageClassificationInferencer(cfg, checkpoint, device=device, classes=classes)
    visualizer = UniversalVisualizer()

    def predict(pictures):
        samples = inferencer(
            list(map(str, pictures)), batch_size=len(pictures), return_datasamples=True
        )
        for picture, sample in zip(pictures, samples, strict=True):
            visualizer.visualize_cls(
                mmcv.imread(picture, channel_order='rgb'),
                sample,
                classes=classes,
                draw_gt=False,
                out_file=str(out_dir / 'vis' / picture.name),
            )
            scores, labels = sample.pred_score.sort(descending=True)
            best = [
                dict(label=label, name=classes[label], score=score)
                for label, score in zip(labels[:5].tolist(), scores[:5].tolist(), strict=True)
            ]
            yield dict(**best[0], top5=best), None

    return inferencer.model, predict


# --- output --------------------------------------------------------------------------------------


def as_json(found):
    """JSON of a dict with a line for each key, and for each list or object in a list."""

    def dump(value):
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], list | dict):
            value = '[\n    ' + ',\n    '.join(map(dump, value)) + '\n  ]'
        else:
            value = dump(value)
        lines.append(f'  {dump(key)}: {value}')
    return '{\n' + ',\n'.join(lines) + '\n}\n'


MAKERS = dict(mmdet=detector, mmseg=segmentor, mmpretrain=classifier)


def infer(pictures, cfg, scope, checkpoint, device, out_dir, batch_size, score_thr):
    if 'test_dataloader' not in cfg:
        sys.exit('The config has no test_dataloader, whose pipeline prepares the pictures.')
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        sys.exit(f'--device {device} cannot be used here: {str(error).splitlines()[0]}')
    init_default_scope(scope)
    file = read_checkpoint(checkpoint)
    meta = read_dataset_meta(cfg, file)
    shapes = read_shapes(pictures)
    names = result_names(pictures)
    try:
        model, predict = MAKERS[scope](cfg, checkpoint, device, meta, out_dir, score_thr)
    except CheckpointMismatchError as error:
        sys.exit(f'{checkpoint}: {error}')
    refuse_other_model(model, file, checkpoint)
    for folder in ('vis', 'preds'):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    batches = list(make_batches(shapes, batch_size))
    for batch in track(batches, 'Inference'):
        for picture, (found, label_map) in zip(batch, predict(batch), strict=True):
            target = out_dir / 'preds' / names[picture]
            found = dict(image=picture.name, **found)
            if label_map is not None:
                found['label_map'] = f'{target.name}.png'
                kind = np.uint8 if len(meta['classes']) <= 256 else np.uint16
                mmcv.imwrite(label_map.astype(kind), f'{target}.png')
            Path(f'{target}.json').write_text(as_json(found), encoding='utf-8')


def natural(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is below 1')
    return number


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('image', type=Path, help='picture, or folder of pictures')
    parser.add_argument('config', help='config file; its default_scope names the toolbox')
    parser.add_argument('checkpoint', help='path or URL of the trained checkpoint')
    parser.add_argument('--out-dir', type=Path, default='outputs', help='default: outputs')
    parser.add_argument('--device', default=get_device(), help='default here: %(default)s')
    parser.add_argument(
        '--batch-size', type=natural, default=1, help='pictures of one size at a time; default: 1'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        help='detectors: draw what is at least as sure; the JSON has all. Default: 0.3',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='settings to override, as key=value'
    )
    args = parser.parse_args(arguments)
    pictures = find_pictures(args.image)
    if not Path(args.config).is_file():
        sys.exit(f'{args.config}: no such config (searched from {Path.cwd()}).')
    cfg, scope = read_config(args.config, args.cfg_options)
    if args.score_thr is not None and scope != 'mmdet':
        sys.exit(f'--score-thr is for detectors; {args.config} is for {scope}.')
    score_thr = 0.3 if args.score_thr is None else args.score_thr
    infer(
        *(pictures, cfg, scope, args.checkpoint),
        *(args.device, args.out_dir, args.batch_size, score_thr),
    )
    print(f'Done: {len(pictures)} in {args.out_dir / "vis"} and {args.out_dir / "preds"}')


if __name__ == '__main__':
    main()
