"""The channel that says what is padding, from mmdet's and mmseg's data to boxes and label maps."""

from pathlib import Path

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS as DET_MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData, PixelData
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS as SEG_MODELS
from mmseg.structures import SegDataSample

from visionseq_mm.registry import MODELS

NORMALIZE = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
NANO = Path(__file__).parents[1] / 'configs/nano/retinanet_secvit-nano_1xb2-500_nuts-400x300.py'
SIZES = (60, 100), (96, 70), (33, 128)


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), generator=generator).byte() for size in SIZES]


def det_samples(images):
    def sample(image):
        size = tuple(image.shape[1:])
        metainfo = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0)
        sample = DetDataSample(metainfo=metainfo)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[5.0, 5.0, 20.0, 30.0]]), labels=torch.tensor([0])
        )
        return sample

    return [sample(image) for image in images]


def seg_samples(images):
    def sample(image):
        size = tuple(image.shape[1:])
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
        return sample

    return [sample(image) for image in images]


def sizes_of(valid):
    """Rows and columns of masks (B, H, W) that are rectangles at the top left."""
    sizes = [(int(m.any(1).sum()), int(m.any(0).sum())) for m in valid]
    for mask, (h, w) in zip(valid, sizes, strict=True):
        assert mask.sum() == h * w
        assert (mask[:h, :w] == 1).all()
    return sizes


def build_det(**kwargs):
    config = dict(type='visionseq_mm.DetDataPreprocessor', pad_size_divisor=32, **NORMALIZE)
    return DET_MODELS.build({**config, **kwargs})


def test_detection():
    data = dict(inputs=pictures(), data_samples=det_samples(pictures()))
    result = build_det(pad_value=9)(data)
    plain = DetDataPreprocessor(pad_size_divisor=32, pad_value=9, **NORMALIZE)(
        dict(inputs=pictures(), data_samples=det_samples(pictures()))
    )
    assert result['inputs'].shape == (3, 4, 96, 128)
    torch.testing.assert_close(result['inputs'][:, :3], plain['inputs'])
    assert sizes_of(result['inputs'][:, 3]) == list(SIZES)
    assert result['data_samples'][0].batch_input_shape == (96, 128)


def test_detection_without_samples():
    """As an inferencer or a speed test may give them; and one tensor as a loader collates it."""
    batch = build_det()(dict(inputs=pictures()))['inputs']
    assert sizes_of(batch[:, 3]) == list(SIZES)
    batch = build_det()(dict(inputs=torch.stack([pictures()[0]] * 2)))['inputs']
    assert batch.shape == (2, 4, 64, 128)
    assert sizes_of(batch[:, 3]) == [SIZES[0]] * 2


@pytest.mark.parametrize(
    'augment',
    [
        dict(type='BatchFixedSizePad', size=(128, 256), pad_mask=False),
        dict(type='BatchSyncRandomResize', random_size_range=(160, 160), interval=1),
    ],
    ids=lambda a: a['type'],
)
def test_batch_augments(augment):
    MessageHub.get_current_instance().update_info('iter', 0)
    preprocessor = build_det(batch_augments=[augment])
    for _ in range(2):  # the second batch of the latter is resized to what the first has drawn
        data = dict(inputs=pictures(), data_samples=det_samples(pictures()))
        result = preprocessor(data, training=True)
    shapes = [tuple(sample.img_shape) for sample in result['data_samples']]
    assert sizes_of(result['inputs'][:, 3]) == shapes
    resized = augment['type'] == 'BatchSyncRandomResize'
    assert result['inputs'].shape[2:] == ((160, 192) if resized else (128, 256))
    assert (shapes != list(SIZES)) == resized


@pytest.mark.parametrize('training', [True, False])
def test_segmentation(training):
    images = pictures() if training else pictures()[:1]
    settings = dict(size_divisor=32, test_cfg=dict(size_divisor=32), **NORMALIZE)
    ours = SEG_MODELS.build(dict(type='visionseq_mm.SegDataPreProcessor', **settings))
    result = ours(dict(inputs=images, data_samples=seg_samples(images)), training)
    plain = SegDataPreProcessor(**settings)(
        dict(inputs=images, data_samples=seg_samples(images)), training
    )
    torch.testing.assert_close(result['inputs'][:, :3], plain['inputs'])
    assert sizes_of(result['inputs'][:, 3]) == [tuple(x.shape[1:]) for x in images]


def backbone(**kwargs):
    arch = dict(
        embed_dims=(16, 16, 32, 32),
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        layer_scale=(False,) * 4,
    )
    return dict(type='visionseq_mm.SecViT', arch=arch, mask_padding=True, **kwargs)


def detr(mask_padding):
    """Its own parts leave padding out, and have no convolution wider than a token."""
    attention = dict(embed_dims=32, num_heads=2, dropout=0.0, batch_first=True)
    ffn = dict(embed_dims=32, feedforward_channels=32, ffn_drop=0.0)
    config = dict(
        type='DETR',
        num_queries=20,
        data_preprocessor=dict(
            type=f'{"visionseq_mm" if mask_padding else "mmdet"}.DetDataPreprocessor',
            pad_size_divisor=32,
            **NORMALIZE,
        ),
        backbone=dict(backbone(out_indices=3), mask_padding=mask_padding),
        neck=dict(type='ChannelMapper', in_channels=[32], kernel_size=1, out_channels=32),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
        decoder=dict(
            num_layers=1,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
            return_intermediate=True,
        ),
        positional_encoding=dict(num_feats=16, normalize=True),
        bbox_head=dict(
            type='DETRHead',
            num_classes=5,
            embed_dims=32,
            loss_cls=dict(type='CrossEntropyLoss', class_weight=1.0),  # mmdet spoils its default
        ),
        test_cfg=ConfigDict(max_per_img=20),
    )
    torch.manual_seed(0)
    model = DET_MODELS.build(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # none so small that a box could not move
            if p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def boxes_of(model, images):
    data = model.data_preprocessor(dict(inputs=images, data_samples=det_samples(images)))
    data['inputs'] = data['inputs'].double()
    with torch.no_grad():
        found = model(**data, mode='predict')
    return [(x.pred_instances.bboxes, x.pred_instances.scores) for x in found]


def test_boxes_of_an_image_alone_and_padded_in_a_batch():
    images = pictures()
    model = detr(mask_padding=True)
    for image, together in zip(images, boxes_of(model, images), strict=True):
        torch.testing.assert_close(together, boxes_of(model, [image])[0])
    official = detr(mask_padding=False)
    (alone, _), (together, _) = boxes_of(official, images[:1])[0], boxes_of(official, images)[0]
    assert (alone - together).abs().max() > 0.1  # pixels


def test_sliding_windows_of_a_padded_image():
    """Windows are cut with their mask, so that of an image's own pixels nothing changes."""
    config = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='visionseq_mm.SegDataPreProcessor', size=(128, 128)),
        backbone=backbone(),
        decode_head=dict(
            type='FCNHead', in_channels=16, in_index=0, channels=8, kernel_size=1, num_classes=4
        ),
        test_cfg=ConfigDict(mode='slide', crop_size=(64, 64), stride=(64, 64)),
    )
    torch.manual_seed(0)
    model = SEG_MODELS.build(config).double().eval()
    image = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    image[:, 3] = 1
    padded = torch.nn.functional.pad(image, (0, 64, 0, 64))
    meta = [dict(img_shape=(64, 64), ori_shape=(64, 64))]
    wide = [dict(img_shape=(128, 128), ori_shape=(128, 128))]
    with torch.no_grad():
        alone, together = model.inference(image, meta), model.inference(padded, wide)
    torch.testing.assert_close(together[..., :60, :60], alone[..., :60, :60])


def test_detector_trains():
    """With the two lines that a user adds to a config, through mmdet's own losses."""
    config = Config.fromfile(NANO)
    config.merge_from_dict(
        {
            'model.data_preprocessor.type': 'visionseq_mm.DetDataPreprocessor',
            'model.backbone.mask_padding': True,
        }
    )
    model = DET_MODELS.build(config.model)
    data = model.data_preprocessor(
        dict(inputs=pictures(), data_samples=det_samples(pictures())), training=True
    )
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters())


def test_preprocessor_and_backbone_belong_together():
    batch = build_det()(dict(inputs=pictures()))['inputs']
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)'):
        MODELS.build(dict(type='visionseq_mm.Vim', arch='tiny'))(batch)
