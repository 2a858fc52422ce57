"""Scoped types resolve from every toolbox, in a fresh process and from any folder."""

import json
import subprocess
import sys

import pytest

from visionseq_mm.registry import MODELS

MODELS_OF_OURS = (
    'Vim',
    'ViL',
    'SecViT',
    'SECSwin',
    'SECFasterViT',
    'MultiScaleAdapter',
    'LN2d',
)


def python(script, cwd):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize('toolbox', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_types_resolve_from(toolbox, tmp_path):
    """Nothing of ours is imported before."""
    script = f"""if True:
        import json, sys
        from {toolbox}.registry import MODELS
        assert 'visionseq_mm.registry' not in sys.modules
        small = dict(embed_dims=16, depth=4)
        built = [
            MODELS.build(dict(type='visionseq_mm.Vim', arch=small)),
            MODELS.build(dict(type='visionseq_mm.ViL', arch=small, version=1)),
            MODELS.build(dict(type='visionseq_mm.SecViT', arch='tiny', out_indices=0)),
            MODELS.build(dict(type='visionseq_mm.SECSwin', arch='tiny', out_indices=0)),
            MODELS.build(dict(type='visionseq_mm.SECFasterViT', arch='tiny', out_indices=0)),
            MODELS.build(dict(type='visionseq_mm.MultiScaleAdapter', in_channels=16)),
            MODELS.build(dict(type='visionseq_mm.LN2d', num_channels=16)),
        ]
        print(json.dumps([type(m).__module__ + '.' + type(m).__name__ for m in built]))
    """
    modules = ('backbones.vim', 'backbones.vil', 'backbones.secvit', 'backbones.sec_swin')
    modules += ('backbones.sec_fastervit', 'necks.multi_scale_adapter', 'layers')
    expected = [f'visionseq_mm.{m}.{n}' for m, n in zip(modules, MODELS_OF_OURS, strict=True)]
    assert json.loads(python(script, tmp_path)) == expected


def test_registered_names():
    for name in MODELS_OF_OURS:
        assert MODELS.get(name) is not None
    assert MODELS.scope == 'visionseq_mm'


def test_torch_that_is_too_old(tmp_path):
    """A RuntimeError, which mmengine's look-up does not hide as an ImportError."""
    script = """if True:
        import torch
        torch.__version__ = '2.5.1+cu121'
        from mmengine.registry import MODELS
        messages = []
        for build in (
            lambda: __import__('visionseq_mm.registry'),
            lambda: MODELS.build(dict(type='visionseq_mm.Vim')),
        ):
            try:
                build()
            except RuntimeError as error:
                messages.append(str(error))
        assert len(messages) == 2, messages
        assert all('torch >= 2.6' in m and '2.5.1' in m for m in messages), messages
        print('both')
    """
    assert python(script, tmp_path) == 'both'
