"""Images of any size: shapes of the maps, padding, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import CASES, KINDS, PYRAMIDS, build, gradients, image, randomize

PLAIN = [name for name in CASES if name not in PYRAMIDS]


@pytest.mark.parametrize('name', PLAIN)
@pytest.mark.parametrize('size', [(200, 313), (16, 16), (17, 16), (33, 96), (64, 64)])
def test_maps_of_plain_backbones(name, size):
    model = build(name, out_indices=(1, 2)).eval()
    expected = tuple(
        max(math.ceil(n / 8) - 1, 1) if name.endswith('8') else math.ceil(n / 16) for n in size
    )
    with torch.no_grad():
        maps = model(image(*size))
    assert [tuple(m.shape) for m in maps] == [(1, 16, *expected)] * 2


@pytest.mark.parametrize('name', PYRAMIDS)
@pytest.mark.parametrize('size', [(333, 500), (1, 1), (5, 70), (32, 32), (100, 64)])
def test_maps_of_pyramids(name, size):
    with torch.no_grad():
        maps = build(name).eval()(image(*size))
    grid, grids = [math.ceil(math.ceil(n / 2) / 2) for n in size], []
    for _ in range(4):
        grids.append(tuple(grid))
        grid = [math.ceil(n / 2) for n in grid]
    assert [tuple(m.shape[2:]) for m in maps] == grids
    assert [m.shape[1] for m in maps] == [16, 16, 32, 32]
    assert all(m.isfinite().all() for m in maps)


def test_published_secvit_takes_any_size():
    """With the published clusters: 32 do not divide the 84 * 125 tokens, 8 not the 42 * 63."""
    with torch.no_grad():
        maps = build('secvit', num_clusters=(32, 8, 2, 1)).eval()(image(333, 500))
    assert [tuple(m.shape[2:]) for m in maps] == [(84, 125), (42, 63), (21, 32), (11, 16)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize('name', PLAIN)
def test_padding_is_right_and_bottom_and_no_more_than_needed(name):
    model = build(name).eval()
    picture = image(41, 55)  # stride 16 covers 48 x 64, stride 8 only 48 x 56
    padded = F.pad(picture, (0, 1 if name.endswith('8') else 9, 0, 7))
    torch.testing.assert_close(model(picture), model(padded), rtol=0, atol=0)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('shape', [(1, 4, 64, 64), (1, 1, 64, 64), (3, 64, 64), (1, 3, 64)])
def test_bad_images(name, shape):
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)'):
        build(name)(torch.zeros(shape))


@pytest.mark.parametrize('name', CASES)
def test_small_images(name):
    size = (0, 64) if name in PYRAMIDS else (64, 15)
    with pytest.raises(ValueError, match='at least'):
        build(name)(image(*size))


@pytest.mark.parametrize('name', PLAIN)
def test_position_table_is_resized_anew_each_time(name):
    """It trains, so that nothing of it may be kept from one forward to the next."""
    model = build(name).eval()
    with torch.inference_mode():
        before = model(image(80, 48))
    _, grads = gradients(model, image(80, 48))
    assert (grads['pos_embed'] != 0).all()
    with torch.no_grad():
        model.pos_embed.normal_()
        after = model(image(80, 48))
    assert all(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize('name', KINDS)
def test_images_of_a_batch_do_not_mix(name):
    model = randomize(build(name))
    batch = image(40, 70, batch=3, dtype=torch.float64)
    together = model(batch)
    for b in range(3):
        alone = model(batch[b : b + 1])
        for one, all_three in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_three[b : b + 1])
