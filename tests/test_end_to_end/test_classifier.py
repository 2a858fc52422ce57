"""ImageNet's recipes from a foreign folder, on two drawn classes: trained, resumed and tested."""

import math

import numpy as np
import pytest
import torch
from processes import call, losses, metrics, options, tail, the_config
from toy_data import write

import visionseq_mm.registry  # noqa: F401, makes mmengine's checkpoints loadable

PLAIN = 'arch=dict(_delete_=True, embed_dims=32, depth=4)'
#: {recipe: (the backbone in small, how many channels it gives to the classifier)}
RECIPES = {
    'vim/vim-tiny_8xb128_in1k.py': (PLAIN, 32),
    'vil/vil2-tiny_16xb128-800e_in1k-192px.py': (PLAIN, 64),
    'vim/vim-tiny-stride8_8xb128-ft-30e_in1k.py': (PLAIN, 32),
    'vil/vil-tinyplus-stride8_8xb128-ft-30e_in1k.py': (PLAIN, 32),
    'secvit/secvit-tiny_8xb128_in1k.py': ('num_clusters=(32, 8, 2, 1)', 1024),
}
QUICK = tuple(RECIPES)[:1]
SHORT = {
    'train_dataloader.batch_size': 2,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'test_dataloader.num_workers': 0,
    'test_dataloader.persistent_workers': False,
    'default_hooks.logger.interval': 1,
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
    'param_scheduler': None,
    'randomness.seed': 0,
}


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Pictures of two of the thousand classes, and lists of them with their labels."""
    root = tmp_path_factory.mktemp('data') / 'a little ImageNet'
    random = np.random.default_rng(0)
    (root / 'meta').mkdir(parents=True)
    for split, count in (('train', 6), ('val', 2)):
        (root / split).mkdir()
        lines = []
        for i in range(count):
            dark = 100 * (i % 2)
            write(
                root / split / f'{i}.JPEG',
                random.integers(dark, dark + 90, (90, 120, 3), np.uint8),
            )
            lines.append(f'{i}.JPEG {i % 2}\n')
        (root / 'meta' / f'{split}.txt').write_text(''.join(lines))
    return root


@pytest.mark.parametrize(
    'recipe',
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES],
)
def test_recipe(recipe, place, imagenet):
    backbone, channels = RECIPES[recipe]
    config = place / f'small_{the_config(recipe).name}'
    config.write_text(
        f'_base_ = {str(the_config(recipe))!r}\n'
        f'load_from = None\nmodel = dict(backbone=dict({backbone}), '
        f'head=dict(in_channels={channels}))\n'
    )
    work = config.stem
    call(
        *('mim', 'train', 'mmpretrain', config, '--work-dir', work, '--gpus', 0),
        *options(SHORT),
        cwd=place,
        IMAGENET_ROOT=str(imagenet),
    )
    assert list(losses(place / work)) == [1, 2, 3]
    assert all(map(math.isfinite, losses(place / work).values())), losses(place / work)
    checkpoint = torch.load(place / work / 'epoch_1.pth', weights_only=True)
    assert ('ema_state_dict' in checkpoint) is (not recipe.startswith('vil/'))
    output = call(
        *('mim', 'test', 'mmpretrain', config, '--checkpoint', place / work / 'epoch_1.pth'),
        *('--work-dir', f'{work}_tested', '--gpus', 0, *options(SHORT)),
        cwd=place,
        IMAGENET_ROOT=f'{imagenet}/',
    )
    assert {'accuracy/top1', 'accuracy/top5'} <= set(metrics(place / f'{work}_tested')), tail(
        output
    )
