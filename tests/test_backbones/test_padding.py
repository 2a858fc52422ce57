"""Images padded to one size: with ``mask_padding`` their features are those they have alone."""

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import build, gradients, image, randomize

from visionseq_mm.ops.cluster_attention import reference

SIZES = (77, 101), (64, 96), (33, 128)


def marked(picture):
    """With the channel that says that all of it is valid."""
    return torch.cat([picture, torch.ones_like(picture[:, :1])], dim=1)


def pad(picture, size, value=0.0):
    """Marked, and padded right and bottom with `value` to `size`."""
    height, width = picture.shape[2:]
    missing = 0, size[1] - width, 0, size[0] - height
    padded = F.pad(marked(picture), missing)
    padded[:, :3] = F.pad(picture, missing, value=value)
    return padded


@pytest.fixture(scope='module')
def pictures():
    return [image(*size, seed=i, dtype=torch.float64) for i, size in enumerate(SIZES)]


def build_masking(name='secvit', **kwargs):
    return randomize(build(name, mask_padding=True, **kwargs))


@pytest.mark.parametrize('value', [0.0, 7.0, torch.nan], ids=str)
def test_features_do_not_depend_on_the_batch(pictures, value):
    model, plain = build_masking(), randomize(build('secvit'))
    batch = torch.cat([pad(x, (96, 160), value) for x in pictures])
    together = model(batch)
    for i, picture in enumerate(pictures):
        for alone, unmarked, padded in zip(
            model(marked(picture)), plain(picture), together, strict=True
        ):
            h, w = alone.shape[2:]
            torch.testing.assert_close(unmarked, alone)
            torch.testing.assert_close(padded[i : i + 1, :, :h, :w], alone)
            assert (padded[i, :, h:] == 0).all()
            assert (padded[i, :, :, w:] == 0).all()


def test_without_it_they_do(pictures):
    """The official behaviour: padding takes part in the clusters."""
    model = randomize(build('secvit'))
    alone, padded = (model(x)[3] for x in (pictures[0], pad(pictures[0], (96, 160))[:, :3]))
    assert (padded[:, :, :3, :4] - alone).abs().max() > 0.1


@pytest.mark.parametrize('out_norm', [dict(type='visionseq_mm.LN2d'), dict(type='BN')])
def test_padding_of_normalized_maps_is_zero(pictures, out_norm):
    model = build_masking(out_norm=out_norm)
    for alone, padded in zip(
        model(marked(pictures[0])), model(pad(pictures[0], (96, 160))), strict=True
    ):
        h, w = alone.shape[2:]
        torch.testing.assert_close(padded[:, :, :h, :w], alone)
        assert (padded[:, :, h:] == 0).all()


def test_pooled_vector(pictures):
    model = build_masking(out_type='cls')
    alone = torch.cat([model(marked(x))[0] for x in pictures])
    batch = torch.cat([pad(x, (96, 160)) for x in pictures])
    torch.testing.assert_close(model(batch)[0], alone)


def test_gradients(pictures):
    """Those of a batch are the sum of its images'."""
    model = build_masking(out_type='cls')
    total = 0
    for i, picture in enumerate(pictures):
        vector = model(pad(picture, (96, 160)))[0]
        total = total + (vector * (i + 1)).sum()
    expected = torch.autograd.grad(total, list(model.parameters()))
    alone = sum((model(marked(x))[0] * (i + 1)).sum() for i, x in enumerate(pictures))
    actual = torch.autograd.grad(alone, list(model.parameters()))
    torch.testing.assert_close(actual, expected)


def test_an_image_without_valid_pixels(pictures):
    """Such as a sliding window in the padding: zeros, and finite gradients."""
    empty = torch.zeros(1, 4, 64, 64, dtype=torch.float64)
    outputs, grads = gradients(build_masking(), empty)
    assert all((out == 0).all() for out in outputs)
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)


def test_masks_reach_the_clusters(pictures, monkeypatch):
    """Of each stage, as many valid tokens as the image has alone."""
    seen = []

    def partition(k, num_clusters, valid):
        seen.append(valid.sum().item())
        return original(k, num_clusters, valid)

    original = reference.partition
    monkeypatch.setattr(reference, 'partition', partition)
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    build_masking()(pad(pictures[0], (96, 160)))  # 77 x 101
    assert seen == [20 * 26, *[10 * 13] * 2, 5 * 7, 3 * 4]


def test_bad_images():
    with pytest.raises(ValueError, match=r'\(B, 4, H, W\) with mask_padding=True.*got \(1, 3, 64'):
        build('secvit', mask_padding=True)(image(64, 64))
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\) with mask_padding=False.*DetDataPrep'):
        build('secvit')(marked(image(64, 64)))
