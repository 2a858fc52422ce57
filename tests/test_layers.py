import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionseq_mm.layers import LN2d, build_map_norm, resize_grid
from visionseq_mm.registry import MODELS


def test_ln2d_normalises_the_channels():
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    norm = LN2d(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    out = norm(x)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (var + 1e-6).sqrt()
    expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(out, expected)
    assert out.shape == x.shape


def test_ln2d_eps():
    x = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
    out = MODELS.build(dict(type='visionseq_mm.LN2d', num_channels=2, eps=3.0))(x)
    torch.testing.assert_close(out.flatten(), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize('kind', ['LN', nn.LayerNorm])
def test_map_norm_that_would_normalise_the_width(kind):
    with pytest.raises(ValueError, match=r'visionseq_mm\.LN2d'):
        build_map_norm(dict(type=kind), 8)


@pytest.mark.parametrize(
    ('cfg', 'cls'),
    [
        (dict(type='BN', momentum=0.2), nn.BatchNorm2d),
        (dict(type='SyncBN'), nn.SyncBatchNorm),
        (dict(type='GN', num_groups=2), nn.GroupNorm),
        (dict(type='visionseq_mm.LN2d', eps=1e-5), LN2d),
    ],
)
def test_map_norms(cfg, cls):
    before = dict(cfg)
    norm = build_map_norm(cfg, 8)
    assert isinstance(norm, cls)
    assert norm.weight.shape == (8,)
    assert cfg == before


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('grid', [(7, 3), (2, 9), (4, 5)])
def test_resize_grid(dtype, grid):
    """Bicubic, corners not aligned, no antialiasing; float64 tables in float64."""
    table = torch.randn(1, 4, 6, 3, dtype=torch.float64).to(dtype)
    computed = torch.promote_types(dtype, torch.float32)
    expected = F.interpolate(
        table.to(computed).permute(0, 3, 1, 2),
        size=grid,
        mode='bicubic',
        align_corners=False,
        antialias=False,
    )
    resized = resize_grid(table, grid)
    assert resized.dtype == dtype
    torch.testing.assert_close(resized, expected.permute(0, 2, 3, 1).to(dtype), rtol=0, atol=0)


def test_resize_grid_weights_of_keys():
    """Twice as fine: Keys' kernel with a = -3/4 at distances of 1/4 and 3/4."""
    table = torch.zeros(1, 1, 9, 1, dtype=torch.float64)
    table[0, 0, 4] = 1
    resized = resize_grid(table, (1, 18)).flatten()

    def keys(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return ((a + 2) * x - (a + 3)) * x * x + 1
        return a * (((x - 5) * x + 8) * x - 4) if x < 2 else 0

    expected = [keys((i + 0.5) / 2 - 4.5) for i in range(18)]
    torch.testing.assert_close(resized, torch.tensor(expected, dtype=torch.float64))


def test_resize_grid_to_the_same_grid():
    table = torch.randn(1, 4, 6, 3)
    assert resize_grid(table, torch.Size((4, 6))) is table
    assert resize_grid(table, [4, 6]) is table
