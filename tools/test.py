"""Tests a detector, segmentor or classifier: the toolbox's own test.py, by default_scope."""

import sys

from _toolbox import default_scope, make_parser, run, toolbox_script


def main(arguments):
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='keep the predictions: mmdet, mmpretrain: a .pkl file; mmseg: a folder'
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for images with the predictions drawn in')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args, _ = parser.parse_known_args(arguments)
    run(toolbox_script(default_scope(args.config, args.cfg_options), 'test.py'), arguments)


if __name__ == '__main__':
    main(sys.argv[1:])
