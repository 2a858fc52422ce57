"""The same numbers on a GPU as on a CPU; run by `make gpu`."""

import pytest
import torch

from visionseq_mm.backbones import SECSwin, SecViT, ViL, Vim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]

BACKBONES = {
    'vim': (Vim, dict(arch=dict(embed_dims=64, depth=4))),
    'vim-stride8': (Vim, dict(arch=dict(embed_dims=64, depth=4), stride=8)),
    'vil1': (ViL, dict(arch=dict(embed_dims=64, depth=4), version=1)),
    'vil2': (ViL, dict(arch=dict(embed_dims=64, depth=4))),
    'vil2-quad': (ViL, dict(arch=dict(embed_dims=64, depth=4), traversal='quad')),
    'vil2-all-kept': (ViL, dict(arch=dict(embed_dims=64, depth=4), recompute='none')),
    'secvit': (
        SecViT,
        dict(
            arch=dict(
                embed_dims=(32, 64, 96, 128),
                depths=(1, 1, 1, 1),
                num_heads=(1, 2, 3, 4),
                layer_scale=(False, False, True, True),
            )
        ),
    ),
    'secvit-heads-of-16': (
        SecViT,
        dict(
            arch=dict(
                embed_dims=(48, 64, 80, 128),
                depths=(1, 1, 2, 1),
                num_heads=(3, 2, 5, 4),
                layer_scale=(False, False, True, True),
            ),
            recompute='kernel',
        ),
    ),
    'sec-swin': (
        SECSwin,
        dict(
            arch=dict(embed_dims=(32, 64, 128, 256), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
        ),
    ),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_forward_and_gradients_equal_the_cpu(name):
    """In float64, where no cluster depends on the order of a sum."""
    torch.manual_seed(0)
    build, kwargs = BACKBONES[name]
    backbone = build(**kwargs).double()
    image = torch.randn(2, 3, 100, 157, dtype=torch.float64)
    results = []
    for device in ('cpu', 'cuda'):
        backbone = backbone.to(device)
        backbone.zero_grad()
        maps = backbone(image.to(device))
        sum((m * m).mean() for m in maps).backward()
        grads = [p.grad.cpu() for p in backbone.parameters()]
        results.append([m.detach().cpu() for m in maps] + grads)
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', [name for name in BACKBONES if name.startswith('sec')])
@pytest.mark.parametrize('padded', [False, True])
def test_training_step_of_pyramids_in_float32(name, padded):
    """Kernels beside the reference in float64; rounding moves a token or two to other clusters."""
    torch.manual_seed(0)
    build, kwargs = BACKBONES[name]
    backbone = build(mask_padding=padded, **kwargs).cuda()
    image = torch.randn(2, 3, 130, 157, device='cuda')
    if padded:
        valid = torch.zeros(2, 1, 130, 157, device='cuda')
        valid[0], valid[1, :, :100, :77] = 1, 1
        image = torch.cat([image, valid], 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = step(backbone, image)
    expected = step(backbone.double(), image.double())
    least = 1e-5 * max(y.norm() for y in expected)  # of biases that a batch norm takes away
    for x, y in zip(actual, expected, strict=True):
        assert x.isfinite().all() and (x - y).norm() <= 5e-2 * y.norm() + least


def step(backbone, image):
    """Maps and gradients."""
    backbone.zero_grad()
    maps = backbone(image)
    sum((m * m).mean() for m in maps).backward()
    return [m.detach() for m in maps] + [p.grad.clone() for p in backbone.parameters()]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', BACKBONES)
def test_training_step_under_autocast_is_finite(name, dtype):
    build, kwargs = BACKBONES[name]
    backbone = build(with_cp=True, **kwargs).cuda()
    with torch.autocast('cuda', dtype=dtype):
        maps = backbone(torch.randn(2, 3, 128, 160, device='cuda'))
    sum(m.float().square().mean() for m in maps).backward()
    assert all(torch.isfinite(m).all() for m in maps)
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())
