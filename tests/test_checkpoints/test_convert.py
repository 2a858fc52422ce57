"""tools/convert_checkpoint.py, and its files in mmpretrain."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import goldens
import official_files
import pytest
import torch
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location(
    'convert_checkpoint', ROOT / 'tools' / 'convert_checkpoint.py'
)
convert_checkpoint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_checkpoint)


def convert(*arguments):
    convert_checkpoint.main([str(a) for a in arguments])


@pytest.fixture
def nothing_allowed():
    """torch's restricted unpickler as it is without this package."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


def classifier(backbone, in_channels):
    return dict(
        type='ImageClassifier',
        backbone=backbone,
        head=dict(type='LinearClsHead', num_classes=1000, in_channels=in_channels),
        data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    )


@pytest.fixture(scope='module')
def vim_tiny(tmp_path_factory):
    """(official file of Vim-Ti, the converted one for classification)."""
    folder = tmp_path_factory.mktemp('vim_tiny')
    source, target = folder / 'official.pth', folder / 'converted.pth'
    weights = goldens.load('vim_tiny').weights
    torch.save(official_files.published_form('vim', weights), source)
    convert('vim-tiny', source, target, '--task', 'cls')
    return source, target


@pytest.mark.parametrize(
    ('name', 'family', 'channels'),
    [
        ('vim-tiny', 'vim', 192),
        ('vil-tiny', 'vil', 192),
        ('vil2-tiny', 'vil2', 384),
        ('secvit-tiny', 'secvit', 1024),
    ],
)
def test_golden_logits(name, family, channels, tmp_path):
    case = goldens.load(official_files.VARIANTS[name])
    source, target = tmp_path / 'official.pth', tmp_path / 'converted.pth'
    torch.save(official_files.published_form(family, case.weights), source)
    convert(name, source, target, '--task', 'cls')
    model = MODELS.build(classifier(case.backbone(out_type='cls'), channels)).eval()
    load_checkpoint(model, str(target), strict=True)
    with torch.no_grad():
        logits = model(case.image())
    error = goldens.error(logits, case.expected()['logits'])
    assert error <= goldens.TOLERANCES[case.family][torch.float32]


def test_file(vim_tiny, nothing_allowed):
    """Tensors in our names, and where they came from."""
    source, target = vim_tiny
    checkpoint = torch.load(target, weights_only=True)
    assert set(checkpoint) == {'state_dict', 'meta'}
    names = {k.split('.')[0] for k in checkpoint['state_dict']}
    assert names == {'backbone', 'head'}
    assert all(type(v) is torch.Tensor for v in checkpoint['state_dict'].values())
    assert checkpoint['meta'] == dict(
        name='vim-tiny',
        source='official.pth',
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        weights='model',
        task='cls',
    )


def test_dense(tmp_path, capsys):
    """Any backbone, as JSON; the file is one for its init_cfg."""
    weights, config = official_files.small('secvit')
    source, target = tmp_path / 'official.pth', tmp_path / 'new' / 'converted.pth'
    torch.save(weights, source)
    convert(json.dumps(config), source, target)
    assert 'official.pth (bare)' in capsys.readouterr().out
    tensors = torch.load(target, weights_only=True)['state_dict']
    backbone = MODELS.build(dict(config, init_cfg=dict(type='Pretrained', checkpoint=str(target))))
    assert set(tensors) == set(backbone.state_dict())
    backbone.init_weights()
    assert all(torch.equal(v, tensors[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(
        tensors['stages.0.blocks.0.norm1.weight'], weights['layers.0.blocks.0.norm1.norm.weight']
    )


def test_errors(vim_tiny, tmp_path, capsys):
    source, existing = vim_tiny
    target = tmp_path / 'converted.pth'

    def fails(*arguments):
        with pytest.raises(SystemExit) as caught:
            convert(*arguments)
        assert not target.exists()
        return f'{caught.value} {capsys.readouterr().err}'

    assert 'misshapen' in fails('vim-small', source, target)
    assert 'there are vim-tiny, ' in fails('vim-huge', source, target)
    assert 'does not exist' in fails('vim-tiny', tmp_path / 'none.pth', target)
    assert 'exists' in fails('vim-tiny', source, existing)
    assert 'pan.baidu.com' in fails('secvit-tiny', 'visionseq://secvit-tiny', target)
    weights, config = official_files.small('vim')
    headless = tmp_path / 'headless.pth'
    torch.save({k: v for k, v in weights.items() if not k.startswith('head.')}, headless)
    assert 'no classifier' in fails(json.dumps(config), headless, target, '--task', 'cls')


CONFIG = """
custom_imports = dict(imports=['visionseq_mm.registry'], allow_failed_imports=False)
default_scope = 'mmpretrain'
model = {model!r}
test_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root={root!r},
        ann_file='labels.txt',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(224, 224)),
            dict(type='PackInputs'),
        ],
    ),
)
test_evaluator = dict(type='Accuracy', topk=(1, 5))
test_cfg = dict()
work_dir = {work_dir!r}
"""


def test_mim_test_mmpretrain(vim_tiny, tmp_path):
    """`mim test` finds the labels that the golden model gives, so all its weights are there."""
    mim = shutil.which('mim', path=str(Path(sys.executable).parent))
    if mim is None:
        pytest.skip('needs openmim')
    case = goldens.load('vim_tiny')
    model = MODELS.build(classifier(case.backbone(out_type='cls'), 192)).eval()
    load_checkpoint(model, str(vim_tiny[1]), strict=True)
    labels = []
    for i in range(3):
        image = ((goldens.image(1, 224, 224, seed=i)[0] + 2) * 60).clamp(0, 255).byte()
        cv2.imwrite(str(tmp_path / f'{i}.png'), image.permute(1, 2, 0).numpy())
        with torch.no_grad():
            logits = model(model.data_preprocessor(dict(inputs=image[None]))['inputs'])
        labels.append(f'{i}.png {logits.argmax().item()}\n')
    (tmp_path / 'labels.txt').write_text(''.join(labels))
    config = tmp_path / 'config.py'
    settings = classifier(case.backbone(out_type='cls'), 192)
    config.write_text(
        CONFIG.format(model=settings, root=str(tmp_path), work_dir=str(tmp_path / 'work'))
    )
    result = subprocess.run(
        [mim, 'test', 'mmpretrain', str(config), '--checkpoint', str(vim_tiny[1])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert re.search(r'accuracy/top1: 100\.0+', output), output
