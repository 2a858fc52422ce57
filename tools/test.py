"""Tests a detector, segmentor or classifier: the toolbox's own test.py, by default_scope."""

import sys

from _toolbox import make_parser, read_config, run, toolbox_script, without_gpu


def check_tta(cfg, config):
    """mmseg's script has no defaults for these two, as the other toolboxes' have."""
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        sys.exit(
            f'--tta: {config} has no {" and no ".join(missing)}, which mmseg needs for it. '
            'configs/_base_/datasets/ade20k_512x512.py has a tta_pipeline to copy, '
            "configs/_base_/default_runtime_seg.py tta_model = dict(type='SegTTAModel')."
        )


def main(arguments):
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='keep the predictions: mmdet, mmpretrain: a .pkl file; mmseg: a folder'
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument(
        '--show-dir',
        help='folder for images with the predictions drawn in; mmseg draws every 50th, or with '
        '--cfg-options default_hooks.visualization.interval=1 all',
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args, _ = parser.parse_known_args(arguments)
    cfg, scope = read_config(args.config, args.cfg_options)
    script = toolbox_script(scope, 'test.py')
    if scope == 'mmseg' and args.tta:
        check_tta(cfg, args.config)
    run(script, [*arguments, *without_gpu(cfg, args)])


if __name__ == '__main__':
    main(sys.argv[1:])
