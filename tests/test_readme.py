"""The README's configs build and run on the toolboxes' own."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as MMDET
from mmengine.config import Config
from mmseg.registry import MODELS as MMSEG

README = (Path(__file__).parents[1] / 'README.md').read_text()


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_config_builds_and_extracts_features(toolbox, tmp_path):
    (snippet,) = (
        code
        for code in re.findall(r'```python\n(.*?)```', README, re.S)
        if f"'{toolbox}::" in code
    )
    path = tmp_path / 'config.py'
    path.write_text(snippet)
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.pop('init_cfg').checkpoint.startswith('visionseq://')
    model = {'mmdet': MMDET, 'mmseg': MMSEG}[toolbox].build(cfg.model).eval()
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(1, 3, 64, 96))
        if toolbox == 'mmseg':
            assert model.decode_head(maps).shape == (1, 150, 16, 24)
        else:
            assert len(model.rpn_head(maps)[0]) == len(maps) == 5
    strides = [4, 8, 16, 32, 64][: len(maps)]
    assert [m.shape[2:] for m in maps] == [(-(-64 // s), -(-96 // s)) for s in strides]
