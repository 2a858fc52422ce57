"""The configs in the README and in docs/custom_data.md build and run."""

import re
from pathlib import Path

import forks
import pytest
import torch
from mmdet.registry import MODELS as MMDET
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS as MMSEG

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_config_builds_and_extracts_features(toolbox, tmp_path):
    (snippet,) = (
        code
        for code in re.findall(r'```python\n(.*?)```', README, re.S)
        if f"'{toolbox}::" in code
    )
    if forks.ONEDL_MMSEG:  # The way out in docs/install.md; a path brings no scope with it.
        snippet = snippet.replace("'mmseg::", "__import__('mmseg').__path__[0] + '/.mim/configs/")
        init_default_scope(toolbox)
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


def test_cascade_for_own_data(tmp_path):
    page = (ROOT / 'docs' / 'custom_data.md').read_text()
    (snippet,) = re.findall(r'## A cascade\n\n```python\n(.*?)```', page, re.S)
    path = tmp_path / 'config.py'
    path.write_text(snippet.replace("'../", f"'{ROOT}/configs/"))
    cfg = Config.fromfile(path)
    base = Config.fromfile(next(ROOT.glob('configs/vim/cascade-mask-rcnn_vim-tiny_*.py')))
    heads, base_heads = (c.model.roi_head.bbox_head for c in (cfg, base))
    assert [head.num_classes for head in heads] == [cfg.model.roi_head.mask_head.num_classes] * 3
    for head, base_head in zip(heads, base_heads, strict=True):
        assert dict(head, num_classes=80) == base_head
