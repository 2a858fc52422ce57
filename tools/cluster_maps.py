"""Draws the clusters within which SecViT and its kin attend, over a picture.

A row for each picture and stage: the picture, then its tokens by head, coloured by cluster.
Clusters are coloured in the order of their keys' cosine with the mean key.
"""

import argparse
import sys
from pathlib import Path

import cv2
import matplotlib
import mmcv
import numpy as np
import torch
from _toolbox import default_scope
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader

from visionseq_mm.analysis.cluster_maps import cluster_maps
from visionseq_mm.backbones import SECFasterViT, SECSwin, SecViT
from visionseq_mm.backbones.base import ClusterPyramid
from visionseq_mm.checkpoints import select_weights
from visionseq_mm.registry import MODELS

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
NAMES = {
    f'{name}-{arch}': dict(type=f'visionseq_mm.{cls.__name__}', arch=arch)
    for name, cls in {
        'secvit': SecViT,
        'sec-swin': SECSwin,
        'sec-fastervit': SECFasterViT,
    }.items()
    for arch in cls.arch_zoo
}
SUFFIXES = '.png', '.jpg', '.jpeg', '.pdf'
DPI, LINE, GAP = 100, 18, 6  # of the drawing, in pixels
# Without its ends, which are both dark.
COLOURS = ListedColormap(matplotlib.colormaps['turbo'](np.linspace(0.1, 0.9, 256)))


# --- input ---------------------------------------------------------------------------------------


def read_model(model):
    """Configs of a backbone and of its pictures' normalisation, for a config file or a name."""
    if model in NAMES:
        return NAMES[model], IMAGENET
    if not Path(model).is_file():
        sys.exit(f'{model} is neither a config file nor one of {", ".join(NAMES)}.')
    init_default_scope(default_scope(model))
    cfg = Config.fromfile(model)
    if 'backbone' not in cfg.model:
        sys.exit(f'{model}: its model, {cfg.model.get("type")}, has no backbone.')
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor', {})
    to_rgb = settings.get('bgr_to_rgb') or settings.get('to_rgb') or False  # mmpretrain's name
    normalisation = dict(mean=settings.get('mean'), std=settings.get('std'), bgr_to_rgb=to_rgb)
    return cfg.model.backbone, normalisation


def build_backbone(config, checkpoint):
    """In eval mode, with the weights of ``checkpoint``, or the same random ones each time."""
    torch.manual_seed(0)
    config = {key: value for key, value in config.items() if key != 'mask_padding'}  # has none
    backbone = MODELS.build(config).eval()
    if not isinstance(backbone, ClusterPyramid):
        sys.exit(f'{type(backbone).__name__} has no clusters; those that do: {", ".join(NAMES)}.')
    if checkpoint is None:
        print('The weights are random: no --checkpoint was given.', file=sys.stderr)
        return backbone
    try:
        weights = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
        weights = select_weights(weights, backbone.prefer_ema())
        prefix = 'backbone.'  # of a whole model
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        backbone.load_state_dict(own or weights, strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'--checkpoint {checkpoint}: {error}')
    return backbone


def read_picture(path, size):
    """BGR pixels, (H, W, 3); ``size``: none, that of the shorter side, or height and width."""
    if not path.is_file():
        sys.exit(f'There is no picture {path}.')
    picture = cv2.imread(str(path))
    if picture is None:
        sys.exit(f'{path} is not a picture that OpenCV reads.')
    if len(size) == 1:
        return mmcv.imrescale(picture, size[0] / min(picture.shape[:2]))
    return mmcv.imresize(picture, size[::-1]) if size else picture


# --- drawing -------------------------------------------------------------------------------------


def choose_heads(stage, labels, heads):
    """{head: its labels (h, w)} from ``labels`` (H, h, w); None chooses all."""
    last = len(labels) - 1
    if wrong := [head for head in heads or [] if not 0 <= head <= last]:
        sys.exit(f'Stage {stage} has heads from 0 to {last}, got --heads {wrong}.')
    return {head: labels[head] for head in (range(last + 1) if heads is None else heads)}


def draw(rows, title, alpha, cell):
    """A Figure of ``rows``, [(BGR picture, stage, {head: labels})], each drawing ``cell`` wide."""
    columns = 1 + max(len(heads) for _, _, heads in rows)
    heights = [round(cell * len(picture) / picture.shape[1]) for picture, _, _ in rows]
    width, height = columns * (cell + GAP), sum(heights) + (len(rows) + 3) * LINE
    figure = Figure((width / DPI, height / DPI), DPI)

    def axes_at(column, top, tall, text):
        box = np.array([column * (cell + GAP), height - top - tall, cell, tall])
        axes = figure.add_axes(box / [width, height, width, height])
        axes.set_title(text, fontsize=8, loc='left', pad=3)
        axes.axis('off')
        return axes

    figure.text(0, 1 - LINE / 2 / height, title, fontsize=9, va='center')
    top = 2 * LINE
    for tall, (picture, stage, heads) in zip(heights, rows, strict=True):
        labels = np.stack(list(heads.values()))
        last, (h, w), stride = labels.max(), labels.shape[1:], 2 ** (stage + 1)
        text = f'stage {stage}: {h}×{w} tokens, {last + 1} clusters'
        axes_at(0, top, tall, text).imshow(picture[..., ::-1])
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        for column, (head, colours) in enumerate(zip(heads, COLOURS(labels / last), strict=True)):
            axes = axes_at(column + 1, top, tall, f'head {head}')
            axes.imshow(grey, 'gray', vmin=0, vmax=255)
            limits = axes.axis()
            # The last tokens may reach beyond the picture.
            reach = np.array([0, w * stride, h * stride, 0]) - 0.5
            axes.imshow(colours, alpha=alpha, extent=reach)
            axes.axis(limits)
        top += tall + LINE
    legend = axes_at(0, top, LINE / 2, 'clusters, from least to most like the mean key')
    legend.imshow(COLOURS(np.linspace(0, 1, cell))[None], aspect='auto')
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help=f'config file, or one of {", ".join(NAMES)}')
    parser.add_argument('pictures', nargs='+', type=Path, metavar='picture')
    parser.add_argument(
        '--checkpoint', help='of the whole model or the backbone (default: random weights)'
    )
    parser.add_argument(
        '--stages', type=int, nargs='+', help='from 1 (default: all that have clusters)'
    )
    parser.add_argument('--block', type=int, default=-1, help='of each, from 0 (default: last)')
    parser.add_argument('--heads', type=int, nargs='+', help='from 0 (default: all)')
    parser.add_argument(
        '--size',
        type=int,
        nargs='+',
        default=[],
        help='pixels that the model sees: shorter side, or height width (default: as they are)',
    )
    parser.add_argument('--alpha', type=float, default=0.7, help='opacity, 0 to 1')
    parser.add_argument('--cell', type=int, default=240, help='width of each drawing, in pixels')
    parser.add_argument(
        '--out', type=Path, default=Path('cluster_maps.png'), help=f'ends in {", ".join(SUFFIXES)}'
    )
    args = parser.parse_args(arguments)
    if len(args.size) > 2 or min(args.size, default=1) < 1:
        parser.error(f'--size takes one or two positive numbers, got {args.size}')
    if not 0 <= args.alpha <= 1:
        parser.error(f'--alpha must lie between 0 and 1, got {args.alpha}')
    if args.cell < 1:
        parser.error(f'--cell must be positive, got {args.cell}')
    if args.out.suffix.lower() not in SUFFIXES:
        parser.error(f'--out must end in {", ".join(SUFFIXES)}, got {args.out}')

    pictures = [read_picture(path, args.size) for path in args.pictures]
    config, normalisation = read_model(args.model)
    backbone = build_backbone(config, args.checkpoint)
    preprocess = ImgDataPreprocessor(**normalisation)
    rows = []
    for picture in pictures:
        image = torch.from_numpy(picture).permute(2, 0, 1)
        inputs = preprocess(dict(inputs=[image]))['inputs']
        try:
            maps = cluster_maps(backbone, inputs, args.stages, args.block)
        except ValueError as error:
            sys.exit(str(error))
        for stage, labels in maps.items():
            rows.append((picture, stage, choose_heads(stage, labels[0].numpy(), args.heads)))

    weights = Path(args.checkpoint).name if args.checkpoint else 'random weights'
    figure = draw(rows, f'{Path(args.model).stem}, {weights}', args.alpha, args.cell)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)


if __name__ == '__main__':
    main()
