"""tools/get_flops.py: whole models, without data."""

import runpy
from pathlib import Path

import pytest
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config

from visionseq_mm.registry import MODELS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    monkeypatch.syspath_prepend(ROOT / 'tools')
    return runpy.run_path(str(ROOT / 'tools' / 'get_flops.py'))


@pytest.mark.parametrize(
    'name, parts',
    [
        ('upernet_vim-nano_1xb8-300_shapes-128x128', ('backbone', 'neck', 'decode_head')),
        (
            'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128',
            ('backbone', 'neck', 'rpn_head', 'roi_head'),
        ),
    ],
)
def test_counts_a_configs_model(name, parts, script, capsys):
    config = ROOT / 'configs' / 'nano' / f'{name}.py'
    script['main']([str(config), '--shape', '64', '96'])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f'{name}.py, 64x96 pixels'
    found = {part: float(number) for part, number, _ in map(str.split, lines)}
    assert tuple(found) == ('all', *parts)
    assert found['all'] == pytest.approx(sum(found[part] for part in parts), abs=0.003)
    backbone = MODELS.build(Config.fromfile(config).model.backbone).eval()
    alone = get_model_complexity_info(backbone, (3, 64, 96), show_table=False, show_arch=False)
    assert found['backbone'] == round(alone['flops'] / 1e9, 3)


def test_padding_marked(script, capsys):
    """The fourth channel costs the backbone nothing; proposals are those of random weights."""
    config = str(ROOT / 'configs' / 'nano' / 'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128.py')
    counts = []
    for marked in (False, True):
        options = f'model.backbone.mask_padding={marked}'
        script['main']([config, '--shape', '64', '--cfg-options', options])
        lines = capsys.readouterr().out.splitlines()
        counts.append([line for line in lines if line.strip().startswith('backbone')])
    assert counts[0] == counts[1] != []


def test_shape_of_three(script):
    with pytest.raises(SystemExit):
        script['main'](['config.py', '--shape', '3', '64', '64'])
