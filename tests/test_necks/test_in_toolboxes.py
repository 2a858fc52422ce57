"""Backbone, adapter and head in mmdet and mmsegmentation: a loss, its gradients, a prediction."""

import importlib

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData, PixelData

BACKBONES = {
    'vim': dict(type='visionseq_mm.Vim', arch=dict(embed_dims=32, depth=4), img_size=64),
    'vil': dict(type='visionseq_mm.ViL', arch=dict(embed_dims=32, depth=4), img_size=64),
}
VITDET = dict(type='visionseq_mm.MultiScaleAdapter', in_channels=32, out_channels=16)
BEIT = dict(type='visionseq_mm.MultiScaleAdapter', in_channels=[32] * 4, norm_cfg=dict(type='BN'))
SIZE = (64, 96)


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def built(toolbox, cfg):
    registry = importlib.import_module(f'{toolbox}.registry')
    importlib.import_module(f'{toolbox}.utils').register_all_modules(init_default_scope=False)
    return registry.MODELS.build(ConfigDict(cfg))


def train_step(model, samples):
    """One loss; every parameter of backbone and neck has a part in it."""
    model.train()
    inputs = torch.randn(len(samples), 3, *SIZE)
    loss, _ = model.parse_losses(model.loss(inputs, samples))
    assert loss.isfinite()
    loss.backward()
    for key, p in model.named_parameters():
        if key.startswith(('backbone', 'neck')):
            assert p.grad is not None and p.grad.isfinite().all(), key


def predict(model, samples, size):
    for sample in samples:
        sample.set_metainfo(
            dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
        )
    with torch.no_grad():
        return model.eval().predict(torch.randn(len(samples), 3, *size), samples)


# ---------------------------------------------------------------------- mmdet


def detection_samples(count=2):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for _ in range(count):
        masks = np.zeros((2, *SIZE), dtype=np.uint8)
        masks[0, 8:40, 8:56] = masks[1, 20:60, 40:90] = 1
        instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 56, 40], [40, 20, 90, 60]]),
            labels=torch.tensor([0, 1]),
            masks=BitmapMasks(masks, *SIZE),
        )
        meta = dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, batch_input_shape=SIZE)
        meta.update(scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(gt_instances=instances, metainfo=meta))
    return samples


def retinanet(backbone, neck, width):
    return dict(
        type='RetinaNet',
        backbone=backbone,
        neck=dict(neck, num_outs=5),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=2,
            in_channels=width,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[4, 8, 16, 32, 64],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(
            nms_pre=100,
            min_bbox_size=0,
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=10,
        ),
    )


def mask_rcnn(backbone, neck, width):
    def roi(size):
        layer = dict(type='RoIAlign', output_size=size, sampling_ratio=0)
        return dict(
            type='SingleRoIExtractor',
            roi_layer=layer,
            out_channels=width,
            featmap_strides=[4, 8, 16, 32],
        )

    assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3)
    sampler = dict(type='RandomSampler', num=32, pos_fraction=0.5, add_gt_as_proposals=False)
    nms = dict(type='nms', iou_threshold=0.7)
    return dict(
        type='MaskRCNN',
        backbone=backbone,
        neck=dict(neck, num_outs=5),
        rpn_head=dict(
            type='RPNHead',
            in_channels=width,
            feat_channels=16,
            anchor_generator=dict(
                type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0], strides=[4, 8, 16, 32, 64]
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=roi(7),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=width,
                fc_out_channels=16,
                roi_feat_size=7,
                num_classes=2,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
                loss_cls=dict(type='CrossEntropyLoss'),
                loss_bbox=dict(type='L1Loss'),
            ),
            mask_roi_extractor=roi(14),
            mask_head=dict(
                type='FCNMaskHead',
                num_convs=1,
                in_channels=width,
                conv_out_channels=16,
                num_classes=2,
                loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=assigner,
                sampler=sampler,
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(nms_pre=100, max_per_img=50, nms=nms, min_bbox_size=0),
            rcnn=dict(
                assigner=dict(assigner, match_low_quality=True),
                sampler=dict(sampler, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=100, max_per_img=20, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.0, nms=nms, max_per_img=5, mask_thr_binary=0.5),
        ),
    )


@pytest.mark.parametrize('detector', [retinanet, mask_rcnn])
@pytest.mark.parametrize(('form', 'width'), [(VITDET, 16), (BEIT, 32)], ids=['vitdet', 'beit'])
def test_detector(detector, form, width):
    out_indices = 3 if form is VITDET else (0, 1, 2, 3)  # ViTDet's takes the last map alone
    backbone = dict(BACKBONES['vim'], out_indices=out_indices)
    model = built('mmdet', detector(backbone, form, width))
    samples = detection_samples()
    train_step(model, samples)
    for result in predict(model, samples, (70, 50)):
        assert result.pred_instances.bboxes.shape[1] == 4
        if detector is mask_rcnn:
            assert result.pred_instances.masks.shape[1:] == (70, 50)


# ---------------------------------------------------------------------- mmseg


@pytest.mark.parametrize(('form', 'width'), [(VITDET, 16), (BEIT, 32)], ids=['vitdet', 'beit'])
def test_segmentor(form, width):
    from mmseg.structures import SegDataSample

    head = dict(
        in_channels=[width] * 4,
        in_index=[0, 1, 2, 3],
        channels=16,
        num_classes=5,
        norm_cfg=dict(type='BN'),
        align_corners=False,
    )
    auxiliary = dict(head, type='FCNHead', in_channels=width, in_index=2, num_convs=1)
    model = built(
        'mmseg',
        dict(
            type='EncoderDecoder',
            backbone=dict(BACKBONES['vil'], out_indices=-1 if form is VITDET else None),
            neck=form,
            decode_head=dict(head, type='UPerHead', pool_scales=(1, 2, 3, 6)),
            auxiliary_head=auxiliary,
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        ),
    )
    samples = []
    for _ in range(2):
        label = PixelData(data=torch.randint(0, 5, (1, *SIZE)))
        samples.append(SegDataSample(gt_sem_seg=label, metainfo=dict(img_shape=SIZE)))
    train_step(model, samples)
    for result in predict(model, samples, (70, 50)):
        assert result.pred_sem_seg.shape == (70, 50)
