"""Trains a detector, segmentor or classifier: the toolbox's own train.py, by default_scope."""

import argparse
import sys

from _toolbox import make_parser, read_config, run, toolbox_script, without_gpu


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


def without_second_amp(arguments, cfg):
    """``arguments`` without ``--amp`` if ``cfg`` has an optimizer wrapper with AMP already.

    mmseg's script would refuse that wrapper for its name, the others put mmengine's in its place.
    """
    wrapper = cfg.get('optim_wrapper', {})
    name = getattr(wrapper.get('type'), '__name__', str(wrapper.get('type')))
    if '--amp' not in arguments or not name.endswith('AmpOptimWrapper'):
        return arguments
    dtype = wrapper.get('dtype')
    if dtype == 'float32':
        sys.exit(
            f"--amp contradicts optim_wrapper.dtype='{dtype}', which is training without it: "
            'leave one of them out.'
        )
    print(f'--amp changes nothing: on a GPU AMP is on already, by optim_wrapper.type={name}.')
    return [flag for flag in arguments if flag != '--amp']


def main(arguments):
    parser = make_parser(__doc__, parents=[resume_and_scale()])
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    args, _ = parser.parse_known_args(arguments)
    cfg, scope = read_config(args.config, args.cfg_options)
    script = toolbox_script(scope, 'train.py')
    arguments = without_second_amp(arguments, cfg)
    if scope == 'mmseg':
        arguments = for_mmseg(arguments)
    run(script, [*arguments, *without_gpu(cfg, args)])


if __name__ == '__main__':
    main(sys.argv[1:])
