"""The examples for one's own data, trained and evaluated from a folder in another place."""

import math

import forks
import pytest
from processes import call, log, losses, options, the_config
from toy_data import draw_camvid, draw_nuts

#: The drawn pictures' size, and no download.
SMALL = {
    'model.backbone.init_cfg': None,
    'train_dataloader.dataset.pipeline.2.scale': '(128,96)',
    'val_dataloader.dataset.pipeline.1.scale': '(128,96)',
    'default_hooks.logger.interval': 1,
}
DETECTION = {'model.data_preprocessor.pad_size_divisor': 32, 'train_cfg.max_epochs': 1}
#: An untrained model is sure of nothing, and its masks take time.
RETINANET = {**DETECTION, 'model.test_cfg.score_thr': 0}
MASK_RCNN = {
    **DETECTION,
    'model.train_cfg.rpn_proposal.max_per_img': 20,
    'model.test_cfg.rpn.max_per_img': 20,
    'model.test_cfg.rcnn.max_per_img': 5,
    'model.test_cfg.rcnn.score_thr': 0,
}
SEGMENTATION = {
    'model.data_preprocessor.size': '(64,64)',
    'train_dataloader.dataset.pipeline.3.crop_size': '(64,64)',
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
}
#: (example, toolbox, variable, how the data is drawn, name of its folder, what is measured)
EXAMPLES = [
    (
        *('upernet_*_camvid-*', 'mmsegmentation', 'CAMVID_ROOT', draw_camvid, 'two streets'),
        *(SEGMENTATION, {'mIoU'}),
    ),
    (
        *('mask-rcnn_*_nuts-*', forks.MMDET, 'NUTS_ROOT', draw_nuts, 'nuts/'),
        *(MASK_RCNN, {'coco/bbox_mAP_50', 'coco/segm_mAP_50'}),
    ),
    (
        *('retinanet_*_nuts-*', forks.MMDET, 'NUTS_ROOT', draw_nuts, 'some nuts/'),
        *(RETINANET, {'coco/bbox_mAP_50'}),
    ),
]


@pytest.mark.parametrize(
    ('pattern', 'toolbox', 'variable', 'draw', 'folder', 'settings', 'measured'),
    EXAMPLES,
    ids=[example[0] for example in EXAMPLES],
)
def test_example(pattern, toolbox, variable, draw, folder, settings, measured, tmp_path):
    draw(tmp_path / 'data' / folder)
    work = tmp_path / 'work'
    work.mkdir()
    call(
        *('mim', 'train', toolbox, the_config(f'custom_data/{pattern}.py')),
        *('--work-dir', 'run', *options(SMALL, settings)),
        cwd=work,
        **{variable: f'{tmp_path}/data/{folder}'},
    )
    assert list(losses(work / 'run')) == [1, 2]
    assert all(map(math.isfinite, losses(work / 'run').values()))
    assert set(log(work / 'run')[-1]) >= measured
