"""Position tables of checkpoints: class rows taken out, own grid found, resized to any other."""

import math

import numpy as np
import official_files
import pytest
import torch

from visionseq_mm.checkpoints import CheckpointMismatchError
from visionseq_mm.registry import MODELS

pytestmark = pytest.mark.usefixtures('one_thread')

D = 192


def bicubic(table, grid):
    """(h, w, D) -> (h', w', D), written out: Keys' kernel with a = -0.75, borders repeated.

    Output i lies at (i + 0.5) * n / n' - 0.5 of the n inputs, whatever the factor.
    """

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def matrix(n_out, n_in):
        m = np.zeros((n_out, n_in))
        for i in range(n_out):
            at = (i + 0.5) * n_in / n_out - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                m[i, min(max(j, 0), n_in - 1)] += kernel(at - j)
        return m

    rows, columns = (matrix(n, m) for n, m in zip(grid, table.shape, strict=False))
    return torch.from_numpy(np.einsum('ih,hwd,jw->ijd', rows, table.double().numpy(), columns))


def random_table(*shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(0))


def small(family, table=None, **settings):
    """(backbone in float64, its official weights) with another position table."""
    weights, config = official_files.small(family)
    if table is not None:
        weights['pos_embed' if family == 'vim' else 'pos_embed.embed'] = table
    return MODELS.build({**config, **settings}).double(), weights


def with_classes(patches, places, value=100.0):
    """Flat official table (1, rows, D) of (h, w, D) patches, class rows of ``value`` put in."""
    rows = list(patches.flatten(0, 1))
    for place in places:
        rows.insert(place, torch.full((D,), value + place))
    return torch.stack(rows)[None]


@pytest.mark.parametrize(
    ('cls_token', 'places'),
    [('middle', [12]), ('head', [0]), ('double', [0, 25]), (None, [])],
)
def test_class_rows(cls_token, places):
    """6x4 patches: the middle is row 12 of 25. None of the patches' rows may move."""
    patches = random_table(6, 4)
    settings = dict(img_size=(96, 64), cls_token=cls_token)
    table = with_classes(patches, places)
    model, weights = small('vim', table, out_type='cls', **settings)
    if cls_token == 'double':
        token = weights.pop('cls_token')
        weights |= dict(cls_token_head=token, cls_token_tail=token + 1)
    elif cls_token is None:
        del weights['cls_token']
    dense, _ = small('vim', **settings)
    for backbone in (model, dense):
        backbone.load_state_dict(weights)
        assert torch.equal(backbone.pos_embed[0], patches.double())
    if cls_token is None:
        assert not hasattr(model, 'cls_pos_embed')
    else:
        assert model.cls_pos_embed[0, :, 0].tolist() == [100.0 + place for place in places]
    if cls_token == 'double':
        assert torch.equal(model.cls_token[:, 1:], (token + 1).double())


@pytest.mark.parametrize(('rows', 'slot'), [(197, 98), (730, 364)])
def test_slot_of_the_released_files(rows, slot):
    """The middle of 196 and of 729 patches; the grid of stride 8 is halved for stride 16."""
    side = math.isqrt(rows - 1)
    patches = random_table(side, side)
    model, weights = small('vim', with_classes(patches, [slot]), out_type='cls')
    model.load_state_dict(weights)
    assert (model.cls_pos_embed == 100 + slot).all()
    torch.testing.assert_close(model.pos_embed[0], bicubic(patches, (14, 14)))


@pytest.mark.parametrize('cls_token', ['middle', 'head', 'double'])
def test_table_without_class_rows(cls_token):
    """For dense features that is all they need."""
    patches = random_table(14, 14)
    dense, weights = small('vim', patches.flatten(0, 1)[None], cls_token=cls_token)
    dense.load_state_dict(weights)
    assert torch.equal(dense.pos_embed[0], patches.double())
    del weights['cls_token']
    dense.load_state_dict(weights)
    assert torch.equal(dense.pos_embed[0], patches.double())


@pytest.mark.parametrize(
    ('cls_token', 'extra'), [(None, 1), (None, 2), ('middle', 2), ('double', 1)]
)
def test_class_rows_without_a_place(cls_token, extra):
    table = with_classes(random_table(14, 14), range(extra))
    dense, weights = small('vim', table, cls_token=cls_token)
    del weights['cls_token']
    with pytest.raises(CheckpointMismatchError, match=f'{extra} class row.*does not say where'):
        dense.load_state_dict(weights)


def test_rows_come_before_columns():
    """A flat table of 128x96 pixels is 8 rows of 6, also for images of another size."""
    patches = random_table(8, 6)
    table = with_classes(patches, [24])
    model, weights = small('vim', table, img_size=(128, 96))
    model.load_state_dict(weights)
    assert torch.equal(model.pos_embed[0, 1, 0], table[0, 6].double())
    assert torch.equal(model.pos_embed[0, 7, 5], table[0, 48].double())
    turned, _ = small('vim', img_size=(96, 128))
    turned.load_state_dict(weights)
    assert torch.equal(turned.pos_embed[0, 1, 0], table[0, 8].double())


def test_neither_own_grid_nor_square():
    """8x6 patches and a class row are 49 rows, which is not to be taken for 7x7 patches."""
    table = with_classes(random_table(8, 6), [24])
    model, weights = small('vim', table)
    with pytest.raises(CheckpointMismatchError, match=r'49 rows .*14x14.*Give .* img_size'):
        model.load_state_dict(weights)
    del weights['cls_token']
    weights['pos_embed'] = table[:, :47]
    with pytest.raises(CheckpointMismatchError, match='47 rows'):
        model.load_state_dict(weights)


@pytest.mark.parametrize('img_size', [(64, 64), (224, 320), (512, 208), (1024, 1024)])
def test_vim_resized_while_loading(img_size):
    """A square table to any grid, equal to the written-out formula."""
    patches = random_table(14, 14)
    model, weights = small('vim', with_classes(patches, [98]), img_size=img_size)
    model.load_state_dict(weights)
    grid = tuple(n // 16 for n in img_size)
    assert model.pos_embed.shape[1:3] == grid
    torch.testing.assert_close(model.pos_embed[0], bicubic(patches, grid))


@pytest.mark.parametrize('family', ['vil', 'vil2'])
@pytest.mark.parametrize(
    ('own', 'img_size'), [((12, 12), 224), ((14, 14), (160, 96)), ((6, 9), 96)]
)
def test_vil_resized_while_loading(family, own, img_size):
    """Its tables have a grid of their own, which need not be square."""
    table = random_table(*own)
    model, weights = small(family, table[None], img_size=img_size)
    model.load_state_dict(weights)
    grid = (
        (img_size // 16,) * 2
        if isinstance(img_size, int)
        else (img_size[0] // 16, img_size[1] // 16)
    )
    torch.testing.assert_close(model.pos_embed[0], bicubic(table, grid))


def test_vil_stride8_keeps_the_grid_of_16():
    table = random_table(14, 14)
    model, weights = small('vil', table[None], stride=8)
    model.load_state_dict(weights)
    assert torch.equal(model.pos_embed[0], table.double())


@pytest.mark.parametrize(
    ('family', 'settings'),
    [('vim', {}), ('vim', dict(stride=8)), ('vil', dict(stride=8)), ('vil2', {})],
)
def test_resized_in_forward(family, settings):
    """To the grid of the image at hand, in the model's own precision."""
    model, _ = small(family, **settings)
    image = torch.randn(1, 3, 75, 130, dtype=torch.float64)
    with torch.no_grad():
        added = model.embed(image) - model.patch_embed(image)
    expected = bicubic(model.pos_embed.detach()[0], added.shape[1:3])
    torch.testing.assert_close(added[0], expected)


def test_own_table_of_another_grid():
    """A model trained at 224 in one built for 160x224, with the class token's row as it is."""
    source, _ = small('vim', out_type='cls')
    target, _ = small('vim', out_type='cls', img_size=(160, 224))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(
        target.pos_embed.detach()[0], bicubic(source.pos_embed.detach()[0], (10, 14))
    )
    assert torch.equal(target.cls_pos_embed, source.cls_pos_embed)


def test_half_precision_table():
    """Resized in the model's dtype, not in the file's."""
    patches = random_table(14, 14).half()
    model, weights = small('vim', with_classes(patches, [98]).half(), img_size=320)
    model.load_state_dict(weights)
    torch.testing.assert_close(model.pos_embed[0], bicubic(patches, (20, 20)))
