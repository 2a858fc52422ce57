"""The table of published files and ``visionseq://``, against a server of this test's own."""

import dataclasses
import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import goldens
import official_files
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmpretrain.registry import MODELS as MMPRETRAIN

from visionseq_mm.checkpoints import PUBLISHED, convert, published_table
from visionseq_mm.compat.safe_load import CheckpointError
from visionseq_mm.registry import MODELS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs' / 'checkpoints.md'
CONFIGS = ROOT / 'configs'


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """``publish(name, checkpoint)``: what ``visionseq://name`` downloads from now on."""
    folder = tmp_path / 'www'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def publish(name, checkpoint):
            entry = PUBLISHED[name]
            if isinstance(checkpoint, bytes):
                (folder / entry.file).write_bytes(checkpoint)
            else:
                torch.save(checkpoint, folder / entry.file)
            url = f'http://127.0.0.1:{server.server_port}/{entry.file}'
            monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(entry, url=url))

        yield publish
        server.shutdown()


@pytest.mark.parametrize(
    ('name', 'family'),
    [('vim-tiny', 'vim'), ('vil-tiny', 'vil'), ('vil2-tiny', 'vil2'), ('secvit-tiny', 'secvit')],
)
def test_download(name, family, publish):
    weights, config = official_files.small(family)
    publish(name, official_files.published_form(family, weights))
    pretrained = dict(type='Pretrained', checkpoint=f'visionseq://{name}')
    backbone = MODELS.build(dict(config, out_type='cls', init_cfg=pretrained))
    backbone.init_weights()
    expected = MODELS.build(dict(config, out_type='cls'))
    expected.load_state_dict(weights)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], tensor), key


def test_page_instead_of_the_file(publish):
    _, config = official_files.small('vim')
    publish('vim-tiny', b'<!DOCTYPE html><html>Log in')
    pretrained = dict(type='Pretrained', checkpoint='visionseq://vim-tiny')
    with pytest.raises(CheckpointError, match='web page'):
        MODELS.build(dict(config, init_cfg=pretrained)).init_weights()


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'vim-huge'; there are vim-tiny, .*secvit-large"):
        CheckpointLoader.load_checkpoint('visionseq://vim-huge')


@pytest.mark.parametrize('name', [k for k, v in PUBLISHED.items() if v.url is None])
def test_files_that_need_a_person(name):
    with pytest.raises(FileNotFoundError) as caught:
        CheckpointLoader.load_checkpoint(f'visionseq://{name}')
    message, entry = str(caught.value), PUBLISHED[name]
    for part in (entry.file, entry.page, entry.source, "init_cfg=dict(type='Pretrained'"):
        assert part in message


def test_names_and_entries():
    """Each names a backbone that can be built, of the variant that its name says."""
    names = """
        vim-tiny vim-small vim-base vim-tiny-stride8 vim-small-stride8
        vil2-tiny vil2-tiny-e400 vil2-small vil2-base
        vil-tiny vil-tiny-e400 vil-tinyplus vil-tinyplus-e400 vil-tinyplus-stride8
        vil-small vil-smallplus vil-smallplus-stride8 vil-base vil-base-stride8
        secvit-tiny secvit-small secvit-base secvit-large
    """
    assert sorted(PUBLISHED) == sorted(names.split())
    urls = [entry.url for entry in PUBLISHED.values() if entry.url]
    assert len(set(urls)) == len(urls)
    for name, entry in PUBLISHED.items():
        family, arch, *more = name.split('-')
        with torch.device('meta'):
            backbone = MODELS.build(entry.backbone)
        assert entry.backbone['arch'] == arch
        assert entry.backbone.get('stride', 16) == (8 if 'stride8' in more else 16)
        if family.startswith('vil'):
            assert backbone.version == (2 if family == 'vil2' else 1)
        if entry.url:
            assert entry.url.startswith('https://') and entry.url.endswith(f'/{entry.file}')
        assert (family == 'secvit') <= (entry.url is None)
        # What the loader takes is what the accuracy was published for, where that is known.
        if entry.weights in ('model', 'model_ema'):
            assert backbone.prefer_ema() == (entry.weights == 'model_ema')
        accuracy = re.search(r'(\d\d)p(\d)acc', entry.file)
        if accuracy:
            assert entry.top1 == float('.'.join(accuracy.groups()))


def test_known_after_importing_the_registry():
    """Inferencers load weights before they build a model."""
    code = (
        'import visionseq_mm.registry\n'
        'from mmengine.runner import CheckpointLoader\n'
        "CheckpointLoader.load_checkpoint('visionseq://no-such')"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert "no published checkpoint is named 'no-such'" in result.stderr


def test_documented():
    """On a miss, paste what published_table() returns."""
    assert published_table() in DOCS.read_text()


#: {name: config that evaluates it}, as the metafiles say.
EVALUATED_BY = {
    model['Checkpoint'].removeprefix('visionseq://'): ROOT / model['Config']
    for metafile in CONFIGS.glob('*/metafile.yml')
    for model in yaml.safe_load(metafile.read_text())['Models']
    if 'Checkpoint' in model
}


def test_every_file_has_a_config():
    assert EVALUATED_BY.keys() == PUBLISHED.keys()


@pytest.mark.parametrize('name', official_files.VARIANTS)
def test_config_takes_its_file(name):
    """All of a file of this variant has a place in the model that evaluates it, and fills it."""
    backbone = MODELS.build(dict(PUBLISHED[name].backbone, out_type='cls'))
    weights = official_files.without_memory(official_files.shapes(name))
    with torch.device('meta'):
        model = MMPRETRAIN.build(Config.fromfile(EVALUATED_BY[name]).model)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in convert(backbone, weights).items()} == expected


@pytest.mark.parametrize('name', ['vim-tiny', 'vil2-tiny', 'secvit-tiny'])
def test_classifier(name, publish):
    """``NAME/cls`` loads as a whole into the model of the config that evaluates it."""
    case = goldens.load(official_files.VARIANTS[name])
    publish(name, official_files.published_form(name.split('-')[0], case.weights))
    model = MMPRETRAIN.build(Config.fromfile(EVALUATED_BY[name]).model).eval()
    load_checkpoint(model, f'visionseq://{name}/cls', strict=True)
    with torch.no_grad():
        logits = model(case.image())
    error = goldens.error(logits, case.expected()['logits'])
    assert error <= goldens.TOLERANCES[case.family][torch.float32]


@pytest.mark.parametrize(
    ('name', 'family', 'config'),
    [
        ('vim-tiny', 'vim', 'vim/vim-tiny-stride8_8xb128-ft-30e_in1k.py'),
        ('vil-tinyplus', 'vil', 'vil/vil-tinyplus-stride8_8xb128-ft-30e_in1k.py'),
    ],
)
def test_start_of_long_sequences(name, family, config, publish):
    """The whole classifier of stride 16, head included, its position table on the finer grid."""
    case = goldens.load(official_files.VARIANTS[name])
    publish(name, official_files.published_form(family, case.weights))
    cfg = Config.fromfile(CONFIGS / config)
    model = MMPRETRAIN.build(cfg.model)
    load_checkpoint(model, cfg.load_from, strict=True)
    weights = torch.load(cached(name), weights_only=True)
    head = weights.get('model', weights.get('state_dict'))
    name = 'head.weight' if family == 'vim' else 'head.1.weight'
    assert torch.equal(model.head.fc.weight, head[name])
    # ViL's table has the grid of stride 16 at any stride.
    assert model.backbone.pos_embed.shape[1] == (27 if family == 'vim' else 14)


def cached(name):
    """Where torch.hub has put the file that ``publish`` serves."""
    return Path(torch.hub.get_dir(), 'checkpoints', PUBLISHED[name].file)


def test_second_step_of_vil():
    """What the training at 192 pixels writes starts the one at 224."""
    first, second = (
        MMPRETRAIN.build(Config.fromfile(CONFIGS / 'vil' / name).model)
        for name in (
            'vil2-tiny_16xb128-800e_in1k-192px.py',
            'vil2-tiny_16xb64-ft-20e_in1k.py',
        )
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.head.fc.weight, first.head.fc.weight)
    assert first.backbone.pos_embed.shape[1:3] == (12, 12)
    assert second.backbone.pos_embed.shape[1:3] == (14, 14)


def test_unknown_task():
    with pytest.raises(ValueError, match="vim-tiny/det: only 'cls' can follow"):
        CheckpointLoader.load_checkpoint('visionseq://vim-tiny/det')
