"""Every recipe against a table made by hand from the papers and the authors' code."""

from pathlib import Path

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).parents[1] / 'configs'
ADE = '_ade20k-512x512'
BIG = '_ade20k-1024x1024'
LSJ = '_coco-1024x1024'
#: {config: (rate, decay, rate by depth, drop path, batch, length, clipping, EMA)}
RECIPES = {
    # Vim: paper (appendix B), then the scripts ft_vim_tiny, ft_vim_small, pt-vim-*, ft-vim-*, and
    # the LazyConfigs of its detection code.
    f'vim/upernet_vim-tiny_4xb4-160k{ADE}': (6e-5, 0.01, 1, 0.1, 16, 160000, None, None),
    f'vim/upernet_vim-small_4xb4-160k{ADE}': (6e-5, 0.01, 1, 0.1, 16, 160000, None, None),
    f'vim/upernet_vim-base_8xb2-160k{BIG}': (6e-5, 0.01, 1, 0.1, 16, 160000, None, None),
    f'vim/upernet_vim-tiny_4xb8-60k{ADE}': (2e-4, 0.1, 1, 0.1, 32, 60000, None, None),
    f'vim/upernet_vim-small_4xb8-60k{ADE}': (1e-4, 0.05, 1, 0.1, 32, 60000, None, None),
    f'vim/cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e{LSJ}': (
        *(1e-4, 0.1, 0.837, 0.1, 64, 100, None, None),
    ),
    f'vim/cascade-mask-rcnn_vim-small_sfp_8xb8-lsj-100e{LSJ}': (
        *(1e-4, 0.1, 0.837, 0.1, 64, 100, None, None),
    ),
    f'vim/cascade-mask-rcnn_vim-base_sfp_8xb8-lsj-100e{LSJ}': (
        *(1e-4, 0.1, 0.7, 0.1, 64, 100, None, None),
    ),
    f'vim/cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-380k{LSJ}': (
        *(1e-4, 0.1, 0.837, 0.1, 64, 380000, None, None),
    ),
    'vim/vim-tiny_8xb128_in1k': (1e-3, 0.1, 1, 0, 1024, 300, None, 4e-5),
    'vim/vim-small_8xb64_in1k': (1e-3, 0.05, 1, 0.05, 512, 300, None, 4e-5),
    'vim/vim-tiny-stride8_8xb128-ft-30e_in1k': (1e-5, 1e-8, 1, 0, 1024, 30, None, 4e-5),
    'vim/vim-small-stride8_8xb128-ft-30e_in1k': (1e-5, 1e-8, 1, 0, 1024, 30, None, 4e-5),
    # The windowed baseline of the same code.
    f'deit/cascade-mask-rcnn_deit-tiny_sfp_8xb8-lsj-100e{LSJ}': (
        *(1e-4, 0.1, 0.7, 0.1, 64, 100, None, None),
    ),
    f'deit/cascade-mask-rcnn_deit-small_sfp_8xb8-lsj-100e{LSJ}': (
        *(1e-4, 0.1, 0.7, 0.1, 64, 100, None, None),
    ),
    # ViL: yamls/segmentation, yamls/pretrain/vil, yamls/longseq.
    f'vil/upernet_vil-tiny_4xb4-160k{ADE}': (5e-4, 0.05, 0.65, 0, 16, 160000, None, None),
    f'vil/upernet_vil-small_4xb4-160k{ADE}': (5e-4, 0.05, 0.65, 0.05, 16, 160000, None, None),
    f'vil/upernet_vil-base_4xb4-160k{ADE}': (5e-4, 0.05, 0.65, 0.1, 16, 160000, None, None),
    'vil/vil2-tiny_16xb128-800e_in1k-192px': (2e-3, 0.05, 1, 0, 2048, 800, 1, None),
    'vil/vil2-tiny_16xb128-400e_in1k-192px': (2e-3, 0.05, 1, 0, 2048, 400, 1, None),
    'vil/vil2-small_16xb128-400e_in1k-192px': (2e-3, 0.05, 1, 0.05, 2048, 400, 1, None),
    'vil/vil2-base_16xb128-400e_in1k-192px': (2e-3, 0.05, 1, 0.2, 2048, 400, 1, None),
    'vil/vil2-tiny_16xb64-ft-20e_in1k': (1e-5, 0.05, 1, 0, 1024, 20, None, None),
    'vil/vil2-small_16xb64-ft-20e_in1k': (1e-5, 0.05, 1, 0.05, 1024, 20, None, None),
    'vil/vil2-base_16xb64-ft-5e_in1k': (1e-5, 0.05, 1, 0.2, 1024, 5, None, None),
    'vil/vil-tiny_16xb128-800e_in1k': (2e-3, 0.05, 1, 0, 2048, 800, 1, None),
    'vil/vil-tiny_8xb128-400e_in1k': (1e-3, 0.05, 1, 0, 1024, 400, 1, None),
    'vil/vil-tinyplus_16xb128-800e_in1k': (2e-3, 0.05, 1, 0, 2048, 800, 1, None),
    'vil/vil-tinyplus_8xb128-400e_in1k': (1e-3, 0.05, 1, 0, 1024, 400, 1, None),
    'vil/vil-small_8xb128-400e_in1k': (1e-3, 0.05, 1, 0.05, 1024, 400, 1, None),
    'vil/vil-smallplus_8xb128-400e_in1k': (1e-3, 0.05, 1, 0.05, 1024, 400, 1, None),
    'vil/vil-base_16xb128-400e_in1k': (2e-3, 0.05, 1, 0.2, 2048, 400, 1, None),
    'vil/vil-tinyplus-stride8_8xb128-ft-30e_in1k': (1e-5, 1e-8, 1, 0, 1024, 30, None, None),
    'vil/vil-smallplus-stride8_8xb128-ft-30e_in1k': (1e-5, 1e-8, 1, 0.05, 1024, 30, None, None),
    'vil/vil-base-stride8_8xb128-ft-30e_in1k': (1e-5, 1e-8, 1, 0.2, 1024, 30, None, None),
    # SecViT: paper (appendix B), main.py; drop paths of the constructors; Semantic FPN as RMT.
    f'secvit/upernet_secvit-small_4xb4-160k{ADE}': (6e-5, 0.01, 1, 0.15, 16, 160000, None, None),
    f'secvit/fpn_secvit-large_8xb2-80k{ADE}': (1e-4, 1e-4, 1, 0.5, 16, 80000, None, None),
    'secvit/retinanet_secvit-tiny_fpn_1x_coco': (1e-4, 1e-4, 1, 0.1, 16, 12, None, None),
    'secvit/mask-rcnn_secvit-base_fpn_1x_coco': (1e-4, 0.05, 1, 0.4, 16, 12, None, None),
    'secvit/mask-rcnn_secvit-small_fpn_ms-3x_coco': (1e-4, 0.05, 1, 0.15, 16, 36, None, None),
    'secvit/cascade-mask-rcnn_secvit-large_fpn_ms-3x_coco': (
        *(1e-4, 0.05, 1, 0.5, 16, 36, None, None),
    ),
    'secvit/secvit-tiny_8xb128_in1k': (1e-3, 0.05, 1, 0.1, 1024, 300, None, 8e-5),
    'secvit/secvit-base_8xb128_in1k': (1e-3, 0.05, 1, 0.4, 1024, 300, None, 8e-5),
}
#: {beginning of the name: shorter side to which test images are resized, crop}
EVALUATION = {'vim/vim': (256, 224), 'vil/vil': (224, 224), 'secvit/secvit': (256, 224)}


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    wrapper, train = cfg.optim_wrapper, cfg.train_cfg
    assert RECIPES[name] == (
        wrapper.optimizer.lr,
        wrapper.optimizer.weight_decay,
        wrapper.paramwise_cfg.layer_decay_rate,
        cfg.model.backbone.get('drop_path_rate', 0),
        cfg.auto_scale_lr.base_batch_size,
        train.get('max_epochs') or train.max_iters,
        wrapper.get('clip_grad', {}).get('max_norm'),
        cfg.default_hooks.get('ema', {}).get('momentum'),
    )
    assert wrapper.optimizer.type == 'AdamW'
    assert tuple(wrapper.optimizer.betas) == (0.9, 0.999)
    if name.startswith('vil/vil') and cfg.model.backbone.get('drop_path_rate', 0):
        assert cfg.model.backbone.drop_path_decay is False


@pytest.mark.parametrize('path', sorted(CONFIGS.rglob('*_in1k*.py')), ids=lambda path: path.stem)
def test_evaluation_of_classifiers(path):
    name = path.relative_to(CONFIGS).as_posix()
    (expected,) = (v for beginning, v in EVALUATION.items() if name.startswith(beginning))
    if '192px' in name:
        expected = (192, 192)
    for loader in ('val_dataloader', 'test_dataloader'):
        _, resize, crop, _ = Config.fromfile(path)[loader].dataset.pipeline
        assert (resize.scale, crop.crop_size) == expected
        assert (resize.edge, resize.backend, resize.interpolation) == (
            *('short', 'pillow', 'bicubic'),
        )
