"""The backbones that are compared, by labels: 'vim-tiny:reference', 'vil-tiny', 'deit-tiny:sdpa'.

'quadratic-tiny' is the time of all 24 cells of a ViL-T in their official, quadratic form,
'official-attention-tiny' that of all 15 cluster attentions of a SecViT-T in theirs.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.common import Size, sides, use_backend

RECOMPUTE = ('none', 'kernel', 'with_cp')
BACKENDS = ('auto', 'reference', 'cpu', 'triton')
ATTENTION = ('sdpa', 'naive')
DEIT = {'tiny': (12, 3), 'small': (12, 6)}  # depth, heads
PRECISIONS = ('float32', 'bfloat16', 'autocast')
PLAIN = ('vim', 'vil')
OURS = {
    'vim': 'Vim',
    'vil': 'ViL',
    'secvit': 'SecViT',
    'sec-swin': 'SECSwin',
    'sec-fastervit': 'SECFasterViT',
}


def build_ours(family: str, arch: str, options: list[str]) -> tuple[nn.Module, str]:
    """Our backbone, Vim and ViL with the last map alone, and the backend that it is to run on."""
    from visionseq_mm import backbones

    backends = [name for name in options if name in BACKENDS] or [None]
    levels = [name for name in options if name in RECOMPUTE]
    if len(backends) > 1 or len(levels) > 1 or not set(options) <= {*BACKENDS, *RECOMPUTE}:
        raise ValueError(
            f'a {OURS[family]} takes one of {BACKENDS} and one of {RECOMPUTE}, got {options}'
        )
    settings = {}
    if levels:
        with_cp = levels == ['with_cp']
        settings = dict(with_cp=True) if with_cp else dict(recompute=levels[0])
    if family in PLAIN:
        settings['out_indices'] = -1
    return getattr(backbones, OURS[family])(arch=arch, **settings), backends[0]


def _timm(name: str, options: list[str], **settings) -> nn.Module:
    """A model with fused or naive attention."""
    import timm

    if len(options) > 1 or not set(options) <= set(ATTENTION):
        raise ValueError(f'{name} takes one of {ATTENTION}, got {options}')
    model = timm.create_model(name, **settings)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = options != ['naive']
    return model


def build_deit(arch: str, options: list[str]) -> tuple[nn.Module, None]:
    """timm's DeiT without its head; any image size, the position table resized to it."""
    model = _timm(f'deit_{arch}_patch16_224', options, num_classes=0, dynamic_img_size=True)
    model.forward = model.forward_features
    return model, None


def build_swin(arch: str, options: list[str]) -> tuple[nn.Module, None]:
    """timm's Swin, four maps; any image size, padded to whole windows of 7×7."""
    name = f'swin_{arch}_patch4_window7_224'
    return _timm(name, options, features_only=True, strict_img_size=False), None


class Windows(nn.Module):
    """An attention that is restricted to windows of a grid, zeros around it, as in ViTDet."""

    def __init__(self, attention: nn.Module, size: int):
        super().__init__()
        self.attention = attention
        self.size = size
        self.grid = (0, 0)  # of the tokens, set before each call

    def forward(self, x, **options):
        (h, w), size = self.grid, self.size
        x = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, -w % size, 0, -h % size))
        windows = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        tokens = self.attention(windows.flatten(0, 2).flatten(1, 2), **options)
        x = tokens.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :h, :w].flatten(1, 2)


class ViTDet(nn.Module):
    """A DeiT as ViTDet uses it (arXiv 2203.16527): no class token, windows of 14×14 but for the
    last block of each quarter, whose attention is global; without relative positions.
    """

    window = 14

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        quarter = len(vit.blocks) // 4
        for i, block in enumerate(vit.blocks):
            if (i + 1) % quarter:
                block.attn = Windows(block.attn, self.window)

    def forward(self, image):
        patch = self.vit.patch_embed.patch_size
        for module in self.vit.blocks.modules():
            if isinstance(module, Windows):
                module.grid = tuple(n // p for n, p in zip(image.shape[2:], patch, strict=True))
        return self.vit.forward_features(image)


def build_vitdet(arch: str, options: list[str]) -> tuple[nn.Module, None]:
    settings = dict(num_classes=0, dynamic_img_size=True, class_token=False, global_pool='avg')
    return ViTDet(_timm(f'deit_{arch}_patch16_224', options, **settings)), None


class QuadraticCell(nn.Module):
    """The cell of a ViL as officially computed, S × S matrices, and nothing around it.

    What it reads takes the image's place. Its time counts for the cells of all layers.
    """

    layers, heads = 24, 4

    def __init__(self, arch: str):
        from visionseq_mm.backbones import ViL

        super().__init__()
        self.channels = 2 * ViL.arch_zoo[arch]['embed_dims'] // self.heads

    def inputs(self, size: Size, batch: int, device: torch.device, dtype: torch.dtype):
        """q, k, v and gates of an image's tokens, heads first."""
        shape = batch, self.heads, tokens_of(size)
        draws = [torch.randn(*shape, self.channels, device=device).to(dtype) for _ in 'qkv']
        return [*draws, torch.randn(shape, device=device), torch.randn(shape, device=device) + 4]

    def forward(self, inputs):
        if self.training:
            inputs = [x.detach().requires_grad_() for x in inputs]
        return peers.quadratic_mlstm(*inputs)

    def bytes(self, size: Size, batch: int, forward: bool) -> int:
        """Of its largest tensors, in float32."""
        return (4 if forward else 16) * batch * self.heads * tokens_of(size) ** 2 * 4


class OfficialAttention(nn.Module):
    """All cluster attentions of a SecViT as officially computed, one layer after the other, and
    nothing around them: no projections, no rotary embedding, no convolution of the values.

    What they read takes the image's place, once for each stage.
    """

    clusters = (32, 8, 2, 1)
    layers = 1  # its time counts once

    def __init__(self, arch: str):
        from visionseq_mm.backbones import SecViT

        super().__init__()
        settings = SecViT.arch_zoo[arch]
        self.depths = settings['depths']
        self.heads = settings['num_heads']
        self.channels = [
            dims // heads for dims, heads in zip(settings['embed_dims'], self.heads, strict=True)
        ]

    def inputs(self, size: Size, batch: int, device: torch.device, dtype: torch.dtype):
        """q, k and v of each stage, heads first."""
        return [
            [torch.randn(shape, device=device).to(dtype) for _ in 'qkv']
            for shape in self.shapes(size, batch)
        ]

    def shapes(self, size: Size, batch: int) -> list[tuple[int, ...]]:
        """Of each stage, with as many tokens as its clusters divide."""
        stages = enumerate(zip(self.heads, self.clusters, self.channels, strict=True))
        return [(batch, H, tokens_of(size, 4 << i) // K * K, Dh) for i, (H, K, Dh) in stages]

    def forward(self, stages):
        results = []
        for stage, depth, K in zip(stages, self.depths, self.clusters, strict=True):
            if self.training:
                stage = [x.detach().requires_grad_() for x in stage]
            for _ in range(depth):
                out = peers.official_attention(*stage, K)
                results = [*results, out] if self.training else [out]
        return tuple(results)

    def bytes(self, size: Size, batch: int, forward: bool) -> int:
        """Of scores and softmax at once, and of what all layers keep of them in training."""
        stages = zip(self.shapes(size, batch), self.clusters, strict=True)
        maps = [4 * B * H * L * L // K for (B, H, L, _), K in stages]
        kept = sum(depth * size for depth, size in zip(self.depths, maps, strict=True))
        return 2 * max(maps) + (0 if forward else kept)


def tokens_of(size: Size, stride: int = 16) -> int:
    height, width = sides(size)
    return (height // stride) * (width // stride)


def build_alone(module: type[nn.Module], arch: str, options: list[str]) -> tuple[nn.Module, None]:
    if options:
        raise ValueError(f'{module.__name__} takes no options, got {options}')
    return module(arch), None


ALONE = {'quadratic': QuadraticCell, 'official-attention': OfficialAttention}
FAMILIES = {
    **{family: partial(build_ours, family) for family in OURS},
    'deit': build_deit,
    'swin': build_swin,
    'vitdet-deit': build_vitdet,
    **{family: partial(build_alone, module) for family, module in ALONE.items()},
}


class Runner:
    """A backbone on a device, ready to be timed.

    Args:
        label: family-arch, then options after colons.
        device: Where it runs.
        precision: 'float32'; 'bfloat16', weights and images cast; 'autocast' to bfloat16.

    Raises:
        ValueError: No such model or option.
    """

    def __init__(self, label: str, device: torch.device, precision: str):
        name, *self.options = label.split(':')
        self.family, _, self.arch = name.rpartition('-')
        if self.family not in FAMILIES or not self.arch:
            raise ValueError(f'no model {label!r}; one is FAMILY-ARCH of {", ".join(FAMILIES)}')
        model, self.backend = FAMILIES[self.family](self.arch, self.options)
        self.label = label
        self.ours = self.family in OURS
        self.alone = self.family in ALONE
        self.repeats = model.layers if self.alone else 1
        self.device = device
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        self.autocast = precision == 'autocast'
        self.model = model.to(device, self.dtype)

    def image(self, size: Size, batch: int) -> Tensor | list:
        if self.alone:
            return self.model.inputs(size, batch, self.device, self.dtype)
        return torch.randn(batch, 3, *sides(size), device=self.device).to(self.dtype)

    def _features(self, image):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out = self.model(image)
        return out if isinstance(out, tuple | list) else (out,)

    def forward(self, image: Tensor) -> None:
        self.model.eval()
        with use_backend(self.backend), torch.inference_mode():
            self._features(image)

    def step(self, image: Tensor) -> None:
        """Forward and backward of a loss on the features; the gradients are dropped."""
        self.model.train()
        with use_backend(self.backend):
            try:
                sum(x.float().square().mean() for x in self._features(image)).backward()
            finally:
                self.model.zero_grad(set_to_none=True)

    def pass_(self, kind: str) -> Callable[[Tensor], None]:
        return {'forward': self.forward, 'step': self.step}[kind]

    def obstacle(self, size: Size, batch: int, kind: str) -> str | None:
        """Why not to try on a CPU, whose memory matrices of tokens by tokens may well exceed."""
        forward = kind == 'forward'
        if self.device.type != 'cpu':
            return None
        if self.alone:
            need = self.model.bytes(size, batch, forward)
        elif self.family == 'deit' and 'naive' in self.options and self.arch in DEIT:
            depth, heads = DEIT[self.arch]
            maps, tokens = 2 if forward else 2 * depth + 2, tokens_of(size) + 1
            need = maps * batch * heads * tokens**2 * 4  # scores and their softmax
        else:
            return None
        if need < 0.8 * available_memory():
            return None
        what = 'gates' if self.family == 'quadratic' else 'attention maps'
        return f'not run: {what} of {need / 2**30:.0f} GiB'


def available_memory() -> float:
    """Bytes that new processes can have; unlimited where the system does not say."""
    try:
        with open('/proc/meminfo') as file:
            fields = dict(line.split(':') for line in file)
    except OSError:
        return float('inf')
    return int(fields['MemAvailable'].split()[0]) * 1024
