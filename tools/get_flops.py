"""Counts the FLOPs of a whole detector, segmentor or classifier, and of its parts.

As mmengine counts: one for a multiplication and addition. Needs no data: the picture is noise.
A two-stage detector's count includes its heads at as many proposals as the noise gives.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from _toolbox import default_scope
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement


def count_flops(config, shape, cfg_options=None):
    """{module: multiplications with additions}, '' for all, for a picture of ``shape`` (h, w)."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(cfg_options or {})
    init_default_scope(default_scope(config, cfg_options))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    sample = BaseDataElement(
        metainfo=dict(
            img_shape=shape,
            ori_shape=shape,
            pad_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1.0, 1.0),
        )
    )
    # mmdet's two-stage detectors need the picture's size beside the picture.
    model.forward = partial(model.forward, data_samples=[sample], mode='tensor')
    picture = torch.randn(1, 3, *shape)
    if cfg.model.get('backbone', {}).get('mask_padding'):
        picture = torch.cat([picture, torch.ones(1, 1, *shape)], dim=1)
    analyzer = FlopAnalyzer(model, picture)
    counts = analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    return {name: counts[name] for name in ('', *dict(model.named_children())) if counts[name]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path, help='config file')
    parser.add_argument(
        '--shape', type=int, nargs='+', default=[1024], help='pixels: one side, or height width'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value')
    args = parser.parse_args(arguments)
    if len(args.shape) > 2:
        parser.error(f'--shape takes one or two numbers, got {len(args.shape)}')
    shape = (args.shape[0], args.shape[-1])
    print(f'{args.config.name}, {shape[0]}x{shape[1]} pixels')
    for name, count in count_flops(args.config, shape, args.cfg_options).items():
        print(f'{name or "all":>16} {count / 1e9:10.3f} G')


if __name__ == '__main__':
    main(sys.argv[1:])
