"""Hands a config over to the script of the toolbox it was written for."""

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device

# default_scope, which is the module's name too: the name to install it by.
TOOLBOXES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}
# What init_process_group reads: where mmengine's launchers find it.
VARIABLES = {
    'pytorch': dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK'),
    'slurm': dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
    'mpi': dict(
        RANK='OMPI_COMM_WORLD_RANK',
        WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
        LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK',
    ),
}


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


def read_config(config, cfg_options=None):
    """``config`` with ``cfg_options`` in it, and its default_scope: a key of ``TOOLBOXES``.

    Exits where it names none. Reading the config obeys its ``custom_imports``. For a checkout
    that is on PYTHONPATH only, this puts the stand-ins for mmcv's ops in place before the
    toolbox's script asks for them.
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
    return cfg, scope


def default_scope(config, cfg_options=None):
    """The toolbox that ``config`` is for, as ``read_config`` finds it."""
    return read_config(config, cfg_options)[1]


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


# --- several processes without a GPU -------------------------------------------------------------


def sync_bn_places(part, path='model'):
    """The dotted paths of what has type SyncBN in ``part`` of a config."""
    if isinstance(part, dict):
        kind = part.get('type')
        name = getattr(kind, '__name__', str(kind)).rpartition('.')[2]
        if name in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
            yield path
        part = part.items()
    elif isinstance(part, (list, tuple)):
        part = enumerate(part)
    else:
        return
    for key, value in part:
        yield from sync_bn_places(value, f'{path}.{key}')


def refuse_sync_bn(cfg, config):
    """Exits if the model has SyncBN, which torch has for GPUs alone, and says how to replace it.

    In one process without a launcher mmengine makes it BN.
    """
    places = list(sync_bn_places(cfg.get('model')))
    options = [f'{place}.type=BN' for place in places]
    if cfg.get('sync_bn'):
        places.append('sync_bn')
        options.append('sync_bn=None')
    if places:
        sys.exit(
            f'{config} has SyncBN at {", ".join(places)}. With a launcher SyncBN needs GPUs, and '
            'there is none here: torch refuses a CPU model that has it. Replace it by BN, whose '
            'statistics are those of each process, which needs two images or more in each:\n'
            f'--cfg-options {" ".join(options)}'
        )


def init_gloo(launcher):
    """Starts the process group of ``launcher`` as mmengine would, but without a GPU."""
    variables = VARIABLES[launcher]
    missing = [name for name in variables.values() if name not in os.environ]
    if missing:
        sys.exit(
            f'--launcher {launcher}, but the environment has no {", ".join(missing)}. Start '
            'with tools/dist_*.sh (pytorch), tools/slurm_*.sh (slurm) or mpirun (mpi).'
        )
    os.environ.update({ours: os.environ[theirs] for ours, theirs in variables.items()})
    os.environ.setdefault('MASTER_PORT', '29500')
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        hosts = ('scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST'])
        os.environ['MASTER_ADDR'] = subprocess.check_output(hosts, text=True).split()[0]
    torch.distributed.init_process_group('gloo')


def without_gpu(cfg, args):
    """Flags with which several processes run on CPUs; none if there is a GPU or no launcher.

    mmengine's launchers and its default wrapper want a GPU, but a process group that has been
    started and a ``model_wrapper_cfg`` come before them.
    """
    if args.launcher == 'none' or get_device() != 'cpu':
        return []
    refuse_sync_bn(cfg, args.config)
    init_gloo(args.launcher)
    if cfg.get('model_wrapper_cfg'):
        return []
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    return ['--cfg-options', *(f'model_wrapper_cfg.{k}={v}' for k, v in wrapper.items())]


# --- the toolbox's script ------------------------------------------------------------------------


def run(script, arguments):
    """Runs ``script`` in this process, as ``python script *arguments`` would."""
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name='__main__')
