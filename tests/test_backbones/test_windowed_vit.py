"""The baseline: DeiT with windows. What timm computes with the same weights, and what loads."""

import pytest
import timm
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS as MMPRETRAIN

from visionseq_mm.checkpoints import CheckpointMismatchError
from visionseq_mm.registry import MODELS


def build(**settings):
    model = MODELS.build(
        dict(
            type='visionseq_mm.WindowedViT',
            arch='deit-tiny',
            out_channels=0,
            use_rel_pos=False,
            **settings,
        )
    )
    model.eval()  # mmpretrain's returns nothing
    return model


@pytest.fixture(scope='module')
def deit():
    """timm's DeiT-Ti without a class token, as the baseline has none; random in all parameters."""
    torch.manual_seed(0)
    model = timm.create_model(
        'deit_tiny_patch16_224',
        class_token=False,
        no_embed_class=True,
        global_pool='avg',
        fc_norm=False,
    ).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.05)
    return model


def test_global_blocks_compute_what_timm_does(deit):
    """With a class token's row in front of the position table, which is left out."""
    weights = dict(deit.state_dict())
    weights['pos_embed'] = torch.cat([torch.ones(1, 1, 192), weights['pos_embed']], dim=1)
    weights['cls_token'] = torch.ones(1, 1, 192)
    vit = build(img_size=224, window_size=0, out_indices=[5, 11])
    vit.load_state_dict({'model': weights})
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        maps = vit(image)
        expected = deit.forward_intermediates(
            image, indices=[5, 11], norm=False, intermediates_only=True
        )
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_windows_keep_to_themselves():
    """A change in one window reaches the others in the global blocks alone."""
    vit = build(img_size=448, out_indices=[1, 2])
    image = torch.randn(1, 3, 448, 448)
    changed = image.clone()
    changed[..., :16, :16] += 1
    with torch.no_grad():
        before, after = vit(image), vit(changed)
    differs = [(x != y).any(dim=1)[0] for x, y in zip(before, after, strict=True)]
    assert differs[0][:14, :14].all()
    assert not differs[0][14:].any() and not differs[0][:, 14:].any()
    assert differs[1].all()


def test_mmpretrain_names_and_another_size():
    torch.manual_seed(0)
    source = MMPRETRAIN.build(dict(type='VisionTransformer', arch='deit-tiny'))
    torch.nn.init.normal_(source.pos_embed)
    vit = build(img_size=512)
    vit.load_state_dict(source.state_dict())
    assert torch.equal(vit.layers[3].attn.qkv.weight, source.layers[3].attn.qkv.weight)
    table = source.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(32, 32), mode='bicubic').permute(0, 2, 3, 1)
    torch.testing.assert_close(vit.pos_embed.detach(), expected)


def test_another_variant_and_table():
    small = timm.create_model('deit_small_patch16_224').state_dict()
    with pytest.raises(CheckpointMismatchError, match='does not fit the backbone WindowedViT'):
        build(img_size=224).load_state_dict(small)
    tiny = timm.create_model('deit_tiny_patch16_224').state_dict()
    tiny['pos_embed'] = tiny['pos_embed'][:, :150]
    with pytest.raises(CheckpointMismatchError, match='table of 150 rows'):
        build(img_size=224).load_state_dict(tiny)


def test_relative_positions_may_be_missing():
    tiny = timm.create_model('deit_tiny_patch16_224').state_dict()
    settings = dict(type='visionseq_mm.WindowedViT', arch='deit-tiny', out_channels=0)
    found = MODELS.build(settings).load_state_dict(tiny, strict=False)
    assert not found.unexpected_keys
    assert {name.split('.')[-1] for name in found.missing_keys} == {'rel_pos_h', 'rel_pos_w'}
