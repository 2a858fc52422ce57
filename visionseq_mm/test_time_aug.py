"""Test-time augmentation of detectors with masks, which mmdet has for boxes alone."""

from importlib.util import find_spec

from visionseq_mm.registry import MODELS, register_absent

if find_spec('mmdet'):
    from mmcv.ops import batched_nms
    from mmdet.models.test_time_augs import DetTTAModel as MMDetTTAModel
    from mmdet.structures.bbox import bbox_flip
    from mmengine.structures import InstanceData

    #: Axes of a map (..., H, W) that a flip reverses.
    FLIPPED = {'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}

    @MODELS.register_module()
    class DetTTAModel(MMDetTTAModel):
        """mmdet's, with its arguments: an image seen in several scales and flipped.

        The boxes of all views go through one NMS; a box that is left brings the mask of its own
        view, where there are masks.
        """

        def _merge_single_sample(self, data_samples):
            merged = InstanceData.cat([self._turned_back(sample) for sample in data_samples])
            if len(merged):
                boxes, kept = batched_nms(
                    merged.bboxes, merged.scores, merged.labels, self.tta_cfg.nms
                )
                merged = merged[kept]
                merged.bboxes, merged.scores = boxes[:, :-1], boxes[:, -1]
            data_samples[0].pred_instances = merged[: self.tta_cfg.max_per_img]
            return data_samples[0]

        @staticmethod
        def _turned_back(sample):
            """What was found in a view, in the places of the image as it was."""
            found = sample.pred_instances
            if sample.flip:
                found.bboxes = bbox_flip(found.bboxes, sample.ori_shape, sample.flip_direction)
                if 'masks' in found:
                    found.masks = found.masks.flip(FLIPPED[sample.flip_direction])
            return found

else:
    DetTTAModel = register_absent(MODELS, 'DetTTAModel', 'mmdet')
