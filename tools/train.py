"""Trains a detector, segmentor or classifier: the toolbox's own train.py, by default_scope."""

import argparse
import sys

from _toolbox import default_scope, make_parser, run, toolbox_script


def resume_and_scale():
    """The two flags that mmseg's script lacks or has in a lesser form."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or from the latest in the work folder if none is given',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size, from the config's auto_scale_lr",
    )
    return parser


def for_mmseg(arguments):
    """``arguments`` as mmseg's script takes them: what it has no flag for, as --cfg-options.

    ``--resume`` without a checkpoint ignores the config's ``load_from``, as in mmdet.
    """
    known, arguments = resume_and_scale().parse_known_args(arguments)
    options = []
    if known.resume is not None:
        arguments.append('--resume')
        options.append(f'load_from={None if known.resume == "auto" else known.resume}')
    if known.auto_scale_lr:
        options.append('auto_scale_lr.enable=True')
    return [*arguments, '--cfg-options', *options] if options else arguments


def main(arguments):
    parser = make_parser(__doc__, parents=[resume_and_scale()])
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU only)')
    args, _ = parser.parse_known_args(arguments)
    scope = default_scope(args.config, args.cfg_options)
    run(
        toolbox_script(scope, 'train.py'),
        for_mmseg(arguments) if scope == 'mmseg' else arguments,
    )


if __name__ == '__main__':
    main(sys.argv[1:])
