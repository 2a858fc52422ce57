"""Metafiles and the tables of the READMEs in configs/ say what the configs are."""

import runpy
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
ZOO = runpy.run_path(str(ROOT / 'tools' / 'update_zoo.py'))
METAFILES = {
    path.parent.name: yaml.safe_load(path.read_text())
    for path in sorted(ROOT.glob('configs/*/metafile.yml'))
}
MODELS = [model for content in METAFILES.values() for model in content['Models']]
#: Of which FLOPs are counted again in the quick tests.
QUICK = (
    'vim-tiny_8xb128_in1k',
    'upernet_vim-tiny_4xb4-160k_ade20k-512x512',
    'vil2-tiny_16xb64-ft-20e_in1k',
    'upernet_vil-nano_1xb8-1k_camvid-160x160',
    'secvit-tiny_8xb128_in1k',
    'mask-rcnn_secvit-nano_1xb8-300_shapes-128x128',
    'upernet_deit-tiny_4xb4-160k_ade20k-512x512',
)


@pytest.mark.parametrize('family', METAFILES)
def test_tables(family):
    """On a miss: python tools/update_zoo.py"""
    readme = (ROOT / 'configs' / family / 'README.md').read_text()
    models = METAFILES[family]['Models']
    assert readme == ZOO['with_tables'](readme, models, Path('configs', family))
    stems = {Path(model['Config']).stem for model in models}
    assert not [stem for stem in stems if f'({stem}.py)' not in readme]


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_metafile(model):
    """All but the FLOPs, which take their time, made anew."""
    assert ZOO['update'](model, ZOO['flops_of'](model)) == model


@pytest.mark.parametrize(
    'model',
    [
        pytest.param(model, marks=() if model['Name'] in QUICK else pytest.mark.slow)
        for model in MODELS
    ],
    ids=lambda model: model['Name'],
)
def test_flops(model):
    cfg = Config.fromfile(ROOT / model['Config'])
    assert ZOO['count_flops'](cfg, ZOO['build'](cfg)) == ZOO['flops_of'](model)


def test_published_numbers_are_near():
    """They are rounded, of other heads, and FLOPs without some of the products that ours count."""
    compared = 0
    for model in MODELS:
        for key, unit, more in (('Parameters', 1e6, 0.06), ('FLOPs', 1e9, 0.25)):
            published = model.get('Published', {}).get(key)
            if published:
                ours, theirs = model['Metadata'][key] / unit, float(published[:-1])
                rounding = 0.5 if '.' not in published else 0.05
                assert ours > theirs - max(rounding, 0.06 * theirs), (model['Name'], key)
                assert ours < theirs + max(rounding, more * theirs), (model['Name'], key)
                compared += 1
    assert compared > 30


def test_unique_names_of_collections_there_are():
    names = [model['Name'] for model in MODELS]
    assert len(set(names)) == len(names)
    collections = {
        c['Name'] for content in METAFILES.values() for c in content.get('Collections', ())
    }
    assert {model['In Collection'] for model in MODELS} <= collections
