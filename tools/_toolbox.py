"""Hands a config over to the script of the toolbox it was written for."""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

# default_scope, which is the module's name too: the name to install it by.
TOOLBOXES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}


def make_parser(description, parents=()):
    """The flags that training and testing share in all toolboxes.

    No abbreviations: they could swallow flags that only the toolbox knows.
    """
    parser = argparse.ArgumentParser(
        description=description,
        parents=parents,
        epilog="Further flags go to the toolbox's own script.",
        allow_abbrev=False,
    )
    parser.add_argument('config', help='config file; its default_scope names the toolbox')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings to override, as key=value; lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torchrun sets LOCAL_RANK; torch.distributed.launch gives it as a flag.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def default_scope(config, cfg_options=None):
    """The toolbox that ``config`` is for: a key of ``TOOLBOXES``; exits where it names none.

    Reading the config obeys its ``custom_imports``. For a checkout that is on PYTHONPATH only,
    this puts the stand-ins for mmcv's ops in place before the toolbox's script asks for them.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(cfg_options or {})
    scope = cfg.get('default_scope')
    if scope not in TOOLBOXES:
        found = 'no default_scope' if scope is None else f'default_scope = {scope!r}'
        sys.exit(
            f'{config} has {found}, so it is not known which toolbox it is for. '
            f'Set default_scope in it to one of {", ".join(map(repr, TOOLBOXES))}.'
        )
    return scope


def toolbox_script(scope, name):
    """The path of ``name`` in the installed toolbox, which mim would run, too."""
    spec = importlib.util.find_spec(scope)
    if spec is None:
        sys.exit(
            f'The config has default_scope = {scope!r}, but {scope} is not installed. '
            f'Install it: pip install {TOOLBOXES[scope]}'
        )
    package = Path(spec.submodule_search_locations[0])
    # An installed toolbox has .mim; a checkout of it may have only the folder beside the package.
    places = [package / '.mim' / 'tools' / name, package.parent / 'tools' / name]
    for place in places:
        if place.is_file():
            return place
    sys.exit(
        f'{scope} has no {name} of its own: looked for {places[0]} and {places[1]}. '
        f'Reinstall it: pip install --force-reinstall --no-deps {TOOLBOXES[scope]}'
    )


def run(script, arguments):
    """Runs ``script`` in this process, as ``python script *arguments`` would."""
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name='__main__')
