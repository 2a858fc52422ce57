"""The wheel, the editable install, and what torch and mim make of them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import forks
import pytest
import yaml
from mmengine.config import Config

ROOT = Path(__file__).parents[1]
METAFILES = sorted(ROOT.glob('configs/*/metafile.yml'))
MIM = ROOT / 'visionseq_mm' / '.mim'
ENTRY_POINT = 'visionseq_mm = visionseq_mm.compat.autoload:install'
mim_finds_installed_packages = pytest.mark.skipif(
    forks.ONEDL_MIM,
    reason='onedl-mim takes the first file that pip recorded, one of *.dist-info, for the package',
)


def call(*command, **kwargs):
    """Standard output of ``command``; its errors in the assertion where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments):
    call(sys.executable, '-m', 'pip', *arguments)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout is not disturbed; `.mim` holds links in both."""
    tree = tmp_path_factory.mktemp('tree') / 'checkout'
    tree.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'model-index.yml'):
        shutil.copy(ROOT / name, tree)
    for name in ('visionseq_mm', 'configs', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for unwanted in ('tests/__init__.py', 'build/lib/visionseq_mm/stale.py'):
        (tree / unwanted).parent.mkdir(parents=True)
        (tree / unwanted).touch()
    pip('wheel', tree, '--no-deps', '--no-build-isolation', '--wheel-dir', tree / 'dist')
    (wheel,) = (tree / 'dist').glob('visionseq_mm-*.whl')
    return wheel


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A folder with the wheel, and the environment of a process that finds it first."""
    folder = tmp_path_factory.mktemp('installed')
    pip('install', '--no-deps', '--no-compile', '--target', folder, wheel)
    return folder, {**os.environ, 'PYTHONPATH': str(folder)}


def test_wheel_holds_package_configs_and_tools(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        (info,) = {name.split('/')[0] for name in archive.namelist()} - {'visionseq_mm'}
        top_level = archive.read(f'{info}/top_level.txt').decode()
        entry_points = archive.read(f'{info}/entry_points.txt').decode()
    sources = {
        f'{target}{path.relative_to(ROOT)}'
        for folder, target in (
            ('visionseq_mm', ''),
            ('configs', 'visionseq_mm/.mim/'),
            ('tools', 'visionseq_mm/.mim/'),
        )
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and not {'.mim', '__pycache__'} & set(path.parts)
    }
    assert names == sources | {'visionseq_mm/.mim/model-index.yml'}
    assert top_level.split() == ['visionseq_mm']
    assert entry_points.split('\n')[:2] == ['[torch.backends]', ENTRY_POINT]


def test_model_index_lists_all_metafiles():
    listed = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    there = [path.relative_to(ROOT).as_posix() for path in METAFILES]
    assert sorted(listed) == sorted(there)


def test_wheel_serves_torch(installed, tmp_path):
    """`import torch` alone readies mmcv's ops for mmdet.apis, from any working folder."""
    folder, environment = installed
    code = """if True:
        import json, sys
        import torch
        loaded = sys.modules['visionseq_mm.compat.autoload'].__file__
        from mmdet.apis import DetInferencer
        import visionseq_mm.registry
        print(json.dumps([loaded, visionseq_mm.registry.__file__]))
    """
    output = call(sys.executable, '-c', code, cwd=tmp_path, env=environment)
    files = json.loads(output.splitlines()[-1])
    package = folder / 'visionseq_mm'
    assert files == [str(package / 'compat/autoload.py'), str(package / 'registry.py')]


@mim_finds_installed_packages
def test_mim_finds_the_package(installed, tmp_path):
    folder, environment = installed
    code = "from mim.utils import get_installed_path as path; print(path('visionseq_mm'))"
    output = call(sys.executable, '-c', code, cwd=tmp_path, env=environment)
    assert output.splitlines()[-1] == str(folder / 'visionseq_mm')


@mim_finds_installed_packages
def test_mim_finds_our_train_script(installed, tmp_path):
    """It gets as far as reading the config; tests/test_tools goes on from there."""
    _, environment = installed
    (tmp_path / 'config.py').write_text('work_dir = "x"\n')
    done = subprocess.run(
        [sys.executable, '-m', 'mim', 'train', 'visionseq_mm', 'config.py'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode != 0
    assert 'config.py has no default_scope' in done.stderr


def mim(installed, cwd, *arguments):
    return call(sys.executable, '-m', 'mim', *arguments, cwd=cwd, env=installed[1])


@mim_finds_installed_packages
def test_mim_search(installed, tmp_path):
    """By name, with what the metafile says."""
    found = mim(installed, tmp_path, 'search', 'visionseq_mm', '--valid-config')
    for path in METAFILES:
        for model in yaml.safe_load(path.read_text())['Models']:
            assert repr(model['Name']) in found
    found = mim(
        *(installed, tmp_path, 'search', 'visionseq_mm', '--model', 'vil'),
        *('--condition', 'parameters<1e7', '--field', 'parameters', 'imagenet-1k/top_1_accuracy'),
    )
    assert 'vil2-tiny_16xb64-ft-20e_in1k' in found and '78.3' in found
    assert 'vil2-base' not in found


@mim_finds_installed_packages
@pytest.mark.parametrize(
    ('name', 'weights'),
    [
        ('upernet_vil-base_8xb2-160k_ade20k-1024x1024', None),
        ('vim-tiny_8xb128_in1k', 'vim_t_midclstok_76p1acc.pth'),
    ],
)
def test_mim_download(name, weights, installed, tmp_path):
    """The whole config, and weights where there are some; here they have come already."""
    if weights:
        (tmp_path / weights).touch()
    mim(installed, tmp_path, 'download', 'visionseq_mm', '--config', name, '--dest', '.')
    (source,) = ROOT.glob(f'configs/*/{name}.py')
    downloaded = Config.fromfile(tmp_path / f'{name}.py')
    assert downloaded.to_dict() == Config.fromfile(source).to_dict()
    assert {path.name for path in tmp_path.iterdir()} == {f'{name}.py', weights} - {None}


def test_editable_install_links_into_the_checkout():
    for distribution in distributions(name='visionseq_mm'):
        origin = json.loads(distribution.read_text('direct_url.json') or '{}')
        if origin.get('dir_info', {}).get('editable') and origin['url'] == ROOT.as_uri():
            break
    else:
        pytest.skip('this checkout is not installed with -e')
    (entry_point,) = distribution.entry_points.select(group='torch.backends')
    assert f'{entry_point.name} = {entry_point.value}' == ENTRY_POINT
    links = {path.name: path.resolve() for path in MIM.iterdir()}
    assert links == {name: ROOT / name for name in ('configs', 'tools', 'model-index.yml')}
