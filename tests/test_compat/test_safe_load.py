"""Checkpoints of every origin load, pickles that run code do not, and errors explain."""

import argparse
import builtins
import contextlib
import functools
import http.server
import os
import pickle
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from visionseq_mm.compat import safe_load
from visionseq_mm.compat.safe_load import CheckpointError, load_file


@pytest.fixture(scope='module', autouse=True)
def installed():
    """The loaders in place; what was there before comes back."""
    schemes, http_loader = CheckpointLoader._schemes.copy(), mmengine_checkpoint.load_from_http
    allowed = torch.serialization.get_safe_globals()
    safe_load.install()
    yield
    CheckpointLoader._schemes, mmengine_checkpoint.load_from_http = schemes, http_loader
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server's folder, its URL and the folder of the cache."""
    folder, cache = tmp_path / 'www', tmp_path / 'hub'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_header(self, keyword, value):
            if keyword == 'Content-Length' and 'cut' in self.path:
                value = str(int(value) + 1000)  # more than it sends
            super().send_header(keyword, value)

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f'http://127.0.0.1:{server.server_port}', cache / 'checkpoints'
        server.shutdown()


def load(path):
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


# --- what must load --------------------------------------------------------------------------


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, *inputs, mode):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def toy_runner(work_dir, epochs, **kwargs):
    dataset = list(torch.randn(4, 2))
    return Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            dataset=dataset,
            sampler=dict(type=DefaultSampler),
            batch_size=2,
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, end=4),
        custom_hooks=[dict(type='EMAHook')],
        log_level='ERROR',
        experiment_name=f'{work_dir.name}-{epochs}',
        **kwargs,
    )


def test_runner_resumes_from_its_own_checkpoint(tmp_path):
    first = toy_runner(tmp_path, 2)
    first.message_hub.update_scalar('train/float32', np.float32(0.5))
    first.message_hub.update_info('best', np.float64(0.25))
    first.train()
    path = tmp_path / 'epoch_2.pth'
    assert torch.load(path, map_location='cpu')['meta']['epoch'] == 2  # torch's own default
    history = load(path)['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert history.statistics('mean') == first.message_hub.get_scalar('train/loss').mean()

    second = toy_runner(tmp_path, 3, load_from=str(path), resume=True)
    second.train()
    assert second.iter == 6
    assert len(second.message_hub.get_scalar('train/loss').data[0]) == 6
    assert second.message_hub.get_info('best') == 0.25


OFFICIAL = {
    'model': {'weight': torch.arange(6.0).view(2, 3)},
    'model_ema': {'weight': torch.ones(2, 3)},
    'args': argparse.Namespace(lr=1e-3, batch_size=64, opt_betas=None, output_dir=''),
    'epoch': 299,
    'max_accuracy': np.float64(76.1),
    'step': np.int64(7),
    'flag': np.bool_(True),
    'curve': np.linspace(0, 1, 4, dtype=np.float32),
}


def rename_numpy_1(path):
    """Let the checkpoint's pickle name the modules of numpy 1."""
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, 'w') as archive:
        for info, content in members:
            if info.filename.endswith('data.pkl'):
                assert b'numpy._core.multiarray' in content
                content = content.replace(b'numpy._core.', b'numpy.core.')
            archive.writestr(info, content)


@pytest.mark.parametrize('numpy_1', [False, True])
@pytest.mark.parametrize('reader', [load, load_file, torch.load])
def test_official_files_load(reader, numpy_1, tmp_path):
    path = tmp_path / 'official.pth'
    torch.save(OFFICIAL, path)
    if numpy_1 and np.lib.NumpyVersion(np.__version__) >= '2.0.0':
        rename_numpy_1(path)
    loaded = reader(path)
    assert torch.equal(loaded['model']['weight'], OFFICIAL['model']['weight'])
    np.testing.assert_array_equal(loaded.pop('curve'), OFFICIAL['curve'])
    for key in OFFICIAL.keys() - {'model', 'model_ema', 'curve'}:
        assert loaded[key] == OFFICIAL[key]
        assert type(loaded[key]) is type(OFFICIAL[key])


@pytest.mark.parametrize('code', '?bBhHiIlLqQefdg')
def test_numpy_types(code, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(code)
    path = tmp_path / 'numbers.pth'
    torch.save([array, array.T, array[0, 1], array.dtype], path)
    for got, wanted in zip(load(path), [array, array.T, array[0, 1], array.dtype], strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert getattr(got, 'dtype', got) == array.dtype


def test_old_file_format(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save({'x': torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    assert load(path)['x'].tolist() == [0, 1, 2]


def test_url_is_read_from_the_cache_afterwards(site, monkeypatch):
    folder, url, cache = site
    torch.save(OFFICIAL, folder / 'vim.pth')
    loaded = load(f'{url}/vim.pth?download=true')
    assert loaded['args'] == OFFICIAL['args']
    assert (cache / 'vim.pth').exists()
    (folder / 'vim.pth').unlink()
    assert load(f'{url}/vim.pth')['epoch'] == 299
    # mmengine's other names for URLs take the same way.
    models = {'vim': f'{url}/vim.pth'}
    monkeypatch.setattr(mmengine_checkpoint, 'get_torchvision_models', lambda: models)
    assert load('torchvision://vim')['epoch'] == 299


@pytest.mark.parametrize(('rank', 'order'), [(0, ['load', 'barrier']), (1, ['barrier', 'load'])])
def test_ranks_read_after_rank_zero(rank, order, site, monkeypatch):
    folder, url, _ = site
    torch.save({'x': 1}, folder / 'a.pth')
    events, fetch = [], torch.hub.load_state_dict_from_url

    def observed(*args, **kwargs):
        events.append('load')
        return fetch(*args, **kwargs)

    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', observed)
    monkeypatch.setattr(safe_load, 'get_dist_info', lambda: (rank, 2))
    monkeypatch.setattr(safe_load, 'barrier', lambda: events.append('barrier'))
    assert load(f'{url}/a.pth') == {'x': 1}
    assert events == order


def test_an_error_of_rank_zero_frees_the_others(site, monkeypatch):
    events = []
    monkeypatch.setattr(safe_load, 'barrier', lambda: events.append('barrier'))
    with pytest.raises(OSError, match='404'):
        load(f'{site[1]}/none.pth')
    assert events == ['barrier']


def test_install_twice_changes_nothing():
    before = set(torch.serialization.get_safe_globals()), CheckpointLoader._schemes.copy()
    safe_load.install()
    assert (set(torch.serialization.get_safe_globals()), CheckpointLoader._schemes) == before


# --- what must not run -----------------------------------------------------------------------


class Call:
    """Pickles as a call: ``function(*args)`` while the pickle is read."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Never called, but pickle wants it: a Call may stand for a function."""


class Build(Call):
    """A call whose result gets ``state`` by ``__setstate__`` or ``__dict__``."""

    def __init__(self, state, function, *args):
        super().__init__(function, *args)
        self.state = state

    def __reduce__(self):
        return self.function, self.args, self.state


def chain(start, *names):
    return functools.reduce(lambda owner, name: Call(getattr, owner, name), names, start)


def attacks(marker):
    touch = f'open({str(marker)!r}, "w").close()'
    # exec, reached through attributes of an allowed class.
    reached = Call(chain(HistoryBuffer, '__init__', '__builtins__', 'get'), 'exec')
    return {
        'os.system': Call(os.system, f'touch {marker}'),
        'exec': Call(builtins.exec, touch),
        'attribute chain': Call(reached, touch),
        # A function that every pickle may use; it calls its first argument.
        'through torch': Call(
            torch._tensor._rebuild_from_type_v2, reached, torch.Tensor, (touch,), {}
        ),
        'statistics': Build({'statistics_methods': {'mean': Call(reached, touch)}}, HistoryBuffer),
        'namespace': Build({'x': Call(os.system, f'touch {marker}')}, argparse.Namespace),
        'object array': np.array([Call(builtins.exec, touch)], dtype=object),
        'map': Call(list, Call(map, builtins.exec, [touch])),
        'open': Call(open, str(marker), 'w'),
        'numpy': Call(np.save, f'{marker}.npy', 0),
    }


@pytest.mark.parametrize('name', attacks('marker'))
def test_code_is_refused(name, site, tmp_path, monkeypatch):
    folder, url, cache = site
    # The proof below would leave its own statistics to all buffers of later tests.
    statistics = dict(HistoryBuffer._statistics_methods)
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', statistics)
    marker = tmp_path / 'marker'
    payload = attacks(marker)[name]
    torch.save({'state_dict': payload}, folder / 'evil.pth')
    torch.save({'x': payload}, folder / 'old.pth', _use_new_zipfile_serialization=False)
    readers = [
        lambda: load(folder / 'evil.pth'),
        lambda: load(folder / 'old.pth'),
        lambda: load(f'{url}/evil.pth'),
        lambda: torch.load(folder / 'evil.pth'),
    ]
    for reader in readers:
        with pytest.raises(pickle.UnpicklingError):
            reader()
    assert not list(tmp_path.glob('marker*'))
    assert not list(cache.iterdir())

    # The proof that it would have run.
    with contextlib.suppress(Exception):
        torch.load(folder / 'evil.pth', weights_only=False)
    assert list(tmp_path.glob('marker*'))


@pytest.mark.parametrize(
    'owner', [HistoryBuffer, argparse.Namespace, np.ndarray, np.dtype, torch.Tensor, set]
)
@pytest.mark.parametrize('name', ['__init__', '__reduce__', '__class__', 'register_statistics'])
def test_getattr_is_refused(owner, name, tmp_path):
    path = tmp_path / 'attribute.pth'
    torch.save(Call(getattr, owner, name), path)
    with pytest.raises(pickle.UnpicklingError, match='something else than HistoryBuffer'):
        load(path)


def test_getattr_takes_no_disguise():
    for owner in (HistoryBuffer(), type('HistoryBuffer', (HistoryBuffer,), {}), 'HistoryBuffer'):
        with pytest.raises(pickle.UnpicklingError):
            safe_load.restricted_getattr(owner, 'mean')
    for name in (
        'statistics',
        'data',
        'update',
        '_statistics_methods',
        type('S', (str,), {})('min'),
    ):
        with pytest.raises(pickle.UnpicklingError):
            safe_load.restricted_getattr(HistoryBuffer, name)
    assert safe_load.restricted_getattr(HistoryBuffer, 'mean') is HistoryBuffer.mean


def test_statistics_cannot_be_called_by_a_pickle(tmp_path):
    path = tmp_path / 'call.pth'
    torch.save(Call(chain(HistoryBuffer, 'current'), Build({'x': 1}, argparse.Namespace)), path)
    with pytest.raises(pickle.UnpicklingError, match='unrecognized function'):
        load(path)


def test_refusal_says_what_was_asked_for(site):
    folder, url, _ = site
    torch.save(Call(os.system, 'true'), folder / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError) as caught:
        load(f'{url}/evil.pth')
    message = str(caught.value)
    for part in (f'{os.system.__module__}.system', f'{url}/evil.pth', 'bare state_dict'):
        assert part in message
    assert 'weights_only' not in message  # torch's advice to turn the protection off
    assert caught.value.__suppress_context__


# --- what is no checkpoint -------------------------------------------------------------------

LOGIN = '<!DOCTYPE html>\n<html><title>Log in</title>' + 'x' * 500
BROKEN = {
    'html.pth': (LOGIN.encode(), r"web page of \d+ bytes that begins '<!DOCTYPE html> <html>"),
    'empty.pth': (b'', 'it is empty'),
    'lfs.pth': (b'version https://git-lfs.github.com/spec/v1\n', "text .* begins 'version https"),
    'array.pth': (b'\x93NUMPY' + bytes(94), '100 bytes are not in a format'),
    'foreign.pth': (pickle.dumps({'x': 1}, 2), 'magic number'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_not_a_checkpoint(name, site):
    folder, url, cache = site
    content, expected = BROKEN[name]
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as local:
        load(path)
    assert str(path) in str(local.value)
    assert path.exists()
    with pytest.raises(CheckpointError, match=expected) as remote:
        load(f'{url}/{name}')
    assert f'It came from {url}/{name}; the cached copy has been removed' in str(remote.value)

    # So the next try is not poisoned.
    assert not list(cache.iterdir())
    torch.save({'x': 1}, path)
    assert load(f'{url}/{name}') == {'x': 1}


@pytest.mark.parametrize('zipped', [True, False])
def test_cut_off(zipped, tmp_path):
    path = tmp_path / 'cut.pth'
    torch.save({'x': torch.zeros(999)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(2, len(whole) - 1, 37):
        path.write_bytes(whole[:size])
        with pytest.raises((CheckpointError, pickle.UnpicklingError)) as caught:
            load(path)
        assert str(path) in str(caught.value)
        if zipped or size > 1000:  # before that, the name of a global may be cut
            assert f'{size} bytes' in str(caught.value)


def test_download_that_breaks_off(site):
    folder, url, cache = site
    torch.save(OFFICIAL, folder / 'whole.pth')
    (folder / 'cut.pth').write_bytes((folder / 'whole.pth').read_bytes()[:-700])
    with pytest.raises(CheckpointError, match='cut off after'):
        load(f'{url}/cut.pth')
    assert not list(cache.iterdir())


def test_damaged_archive(tmp_path):
    path = tmp_path / 'archive.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'a')
        archive.writestr('b.txt', 'b')
    with pytest.raises(CheckpointError, match=r'archive\.pth.*damaged or no checkpoint'):
        load(path)


def test_missing(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ('none.pth', tmp_path, Path('~/no-such-checkpoint.pth')):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            load(path)
    with pytest.raises(OSError, match=r'Cannot download checkpoint http.*none\.pth.*404'):
        load(f'{site[1]}/none.pth')
    with pytest.raises(OSError, match=r'Cannot download checkpoint http://127\.0\.0\.1:1/a'):
        load('http://127.0.0.1:1/a.pth')


def test_errors_about_the_device_stay_as_they_are(tmp_path):
    path = tmp_path / 'whole.pth'
    torch.save({'x': torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match='nowhere') as caught:
        load_file(path, map_location='nowhere')
    assert not isinstance(caught.value, CheckpointError)
