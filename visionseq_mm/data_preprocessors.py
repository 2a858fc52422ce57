"""mmdet's and mmseg's data preprocessors, which tell a backbone where the images are padded.

A batch has one size, so smaller images are padded right and bottom. SecViT and the other
backbones with clusters take, with ``mask_padding=True``, a fourth channel that is 1 on the image
and 0 on its padding. As a channel it takes part in whatever happens to the images afterwards,
such as mmseg's sliding windows.
"""

from importlib.util import find_spec

import torch

from visionseq_mm.registry import MODELS, register_absent


class MarkedPadding:
    """Before a data preprocessor: its images have a fourth channel, 1 where they are valid.

    Images are what the pipeline gives; what ``Pad`` adds there is part of them. After batch
    augments they have their samples' ``img_shape``.

    Shape:
        (B, 4, H, W), normalised and padded as by the data preprocessor.
    """

    def forward(self, data, training=False):
        sizes = [image.shape[-2:] for image in data['inputs']]
        data = super().forward(data, training)
        images, samples = data['inputs'], data['data_samples']
        if training and self.batch_augments is not None:
            sizes = [sample.img_shape for sample in samples]  # which may be resized together
        valid = images.new_zeros((len(images), 1, *images.shape[2:]))
        for mask, (height, width) in zip(valid, sizes, strict=True):
            mask[:, :height, :width] = 1
        return {**data, 'inputs': torch.cat([images, valid], dim=1)}


if find_spec('mmdet'):
    from mmdet.models.data_preprocessors import DetDataPreprocessor as MMDetDataPreprocessor

    @MODELS.register_module()
    class DetDataPreprocessor(MarkedPadding, MMDetDataPreprocessor):
        """mmdet's data preprocessor, with its arguments; see :class:`MarkedPadding`."""

else:
    DetDataPreprocessor = register_absent(MODELS, 'DetDataPreprocessor', 'mmdet')

if find_spec('mmseg'):
    from mmseg.models.data_preprocessor import SegDataPreProcessor as MMSegDataPreProcessor

    @MODELS.register_module()
    class SegDataPreProcessor(MarkedPadding, MMSegDataPreProcessor):
        """mmseg's data preprocessor, with its arguments; see :class:`MarkedPadding`."""

else:
    SegDataPreProcessor = register_absent(MODELS, 'SegDataPreProcessor', 'mmsegmentation')
