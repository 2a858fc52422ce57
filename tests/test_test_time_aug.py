"""Test-time augmentation: masks come back to the places that they have in the image."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.structures import InstanceData

from visionseq_mm.registry import MODELS

HEIGHT, WIDTH = 12, 20


class Detector(BaseModel):
    """Never called: the tests say what was found."""

    def forward(self, inputs, data_samples, mode):
        raise AssertionError


@pytest.fixture
def tta():
    return MODELS.build(
        dict(
            type='visionseq_mm.DetTTAModel',
            module=Detector(),
            tta_cfg=ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=3),
        )
    )


def sample(boxes, scores, labels=None, direction=None, masks=True):
    """What a detector finds in a view; each mask fills its box."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    found = InstanceData(
        bboxes=boxes,
        scores=torch.tensor(scores),
        labels=torch.tensor(labels or [0] * len(scores), dtype=torch.int64),
    )
    if masks:
        found.masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(found.masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
    return DetDataSample(
        pred_instances=found,
        metainfo=dict(
            ori_shape=(HEIGHT, WIDTH), flip=direction is not None, flip_direction=direction
        ),
    )


@pytest.mark.parametrize(
    ('direction', 'box'),
    [
        ('horizontal', [16, 2, 19, 8]),
        ('vertical', [1, 4, 4, 10]),
        ('diagonal', [16, 4, 19, 10]),
    ],
)
def test_flipped_view_wins(tta, direction, box):
    """The same object in both views, and another one that only the plain view has."""
    views = [
        sample([[1, 2, 4, 8], [10, 1, 15, 5]], [0.6, 0.7]),
        sample([box], [0.9], direction=direction),
    ]
    (merged,) = tta.merge_preds([views])
    found = merged.pred_instances
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7]))
    assert found.bboxes.tolist() == [[1, 2, 4, 8], [10, 1, 15, 5]]
    for mask, box in zip(found.masks, found.bboxes.int().tolist(), strict=True):
        x0, y0, x1, y1 = box
        assert mask.sum() == (x1 - x0) * (y1 - y0)
        assert mask[y0:y1, x0:x1].all()


def test_boxes_alone_classes_apart_and_at_most_three(tta):
    box = [1, 2, 4, 8]
    views = [
        sample([box, box], [0.6, 0.5], [0, 1], masks=False),
        sample([[10, 1, 15, 5], [5, 5, 9, 9]], [0.4, 0.3], masks=False),
    ]
    (merged,) = tta.merge_preds([views])
    assert 'masks' not in merged.pred_instances
    assert merged.pred_instances.labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(merged.pred_instances.scores, torch.tensor([0.6, 0.5, 0.4]))


def test_nothing_found_in_one_view(tta):
    views = [sample([], [], direction='horizontal'), sample([[1, 2, 4, 8]], [0.6])]
    (merged,) = tta.merge_preds([views])
    assert merged.pred_instances.bboxes.tolist() == [[1, 2, 4, 8]]
    assert merged.pred_instances.masks[0, 2:8, 1:4].all()


def test_nothing_found(tta):
    (merged,) = tta.merge_preds([[sample([], []), sample([], [], direction='horizontal')]])
    assert len(merged.pred_instances) == 0
    assert merged.pred_instances.masks.shape == (0, HEIGHT, WIDTH)
