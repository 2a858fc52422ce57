"""The backbones that are compared, by labels: 'vim-tiny:reference', 'vil-tiny', 'deit-tiny:sdpa'.

'quadratic-tiny' is the time of all 24 cells of a ViL-T in their official, quadratic form.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.common import use_backend

RECOMPUTE = ('none', 'kernel', 'with_cp')
BACKENDS = ('auto', 'reference', 'cpu', 'triton')
ATTENTION = ('sdpa', 'naive')
DEIT = {'tiny': (12, 3), 'small': (12, 6)}  # depth, heads
PRECISIONS = ('float32', 'bfloat16', 'autocast')
OURS = {'vim': 'Vim', 'vil': 'ViL'}


def build_ours(family: str, arch: str, options: list[str]) -> tuple[nn.Module, str]:
    """Our backbone with the last block's map, and the backend that it is to run on."""
    from visionseq_mm import backbones

    backends = [name for name in options if name in BACKENDS] or [None]
    levels = [name for name in options if name in RECOMPUTE] or ['kernel']
    if len(backends) + len(levels) > 2 or not set(options) <= {*BACKENDS, *RECOMPUTE}:
        raise ValueError(
            f'a {OURS[family]} takes one of {BACKENDS} and one of {RECOMPUTE}, got {options}'
        )
    with_cp = levels == ['with_cp']
    settings = dict(with_cp=True) if with_cp else dict(recompute=levels[0])
    return getattr(backbones, OURS[family])(arch=arch, out_indices=-1, **settings), backends[0]


def build_deit(arch: str, options: list[str]) -> tuple[nn.Module, None]:
    """timm's DeiT without its head; any image size, the position table resized to it."""
    import timm

    if len(options) > 1 or not set(options) <= set(ATTENTION):
        raise ValueError(f'a DeiT takes one of {ATTENTION}, got {options}')
    model = timm.create_model(f'deit_{arch}_patch16_224', num_classes=0, dynamic_img_size=True)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = options != ['naive']
    model.forward = model.forward_features
    return model, None


class QuadraticCell(nn.Module):
    """The cell of a ViL as officially computed, S × S matrices, and nothing around it.

    What it reads takes the image's place. Its time counts for the cells of all layers.
    """

    layers, heads = 24, 4

    def __init__(self, arch: str):
        from visionseq_mm.backbones import ViL

        super().__init__()
        self.channels = 2 * ViL.arch_zoo[arch]['embed_dims'] // self.heads

    def inputs(self, size: int, batch: int, device: torch.device, dtype: torch.dtype):
        """q, k, v and gates of an image's tokens, heads first."""
        shape = batch, self.heads, (size // 16) ** 2
        draws = [torch.randn(*shape, self.channels, device=device).to(dtype) for _ in 'qkv']
        return [*draws, torch.randn(shape, device=device), torch.randn(shape, device=device) + 4]

    def forward(self, inputs):
        if self.training:
            inputs = [x.detach().requires_grad_() for x in inputs]
        return peers.quadratic_mlstm(*inputs)


def build_quadratic(arch: str, options: list[str]) -> tuple[nn.Module, None]:
    if options:
        raise ValueError(f'a quadratic cell takes no options, got {options}')
    return QuadraticCell(arch), None


FAMILIES = {
    **{family: partial(build_ours, family) for family in OURS},
    'deit': build_deit,
    'quadratic': build_quadratic,
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
        self.family, _, self.arch = name.partition('-')
        if self.family not in FAMILIES or not self.arch:
            raise ValueError(f'no model {label!r}; one is FAMILY-ARCH of {", ".join(FAMILIES)}')
        model, self.backend = FAMILIES[self.family](self.arch, self.options)
        self.label = label
        self.ours = self.family in OURS
        self.repeats = model.layers if self.family == 'quadratic' else 1
        self.device = device
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        self.autocast = precision == 'autocast'
        self.model = model.to(device, self.dtype)

    def image(self, size: int, batch: int) -> Tensor | list[Tensor]:
        if self.family == 'quadratic':
            return self.model.inputs(size, batch, self.device, self.dtype)
        return torch.randn(batch, 3, size, size, device=self.device).to(self.dtype)

    def _features(self, image):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out = self.model(image)
        return out if isinstance(out, tuple) else (out,)

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

    def obstacle(self, size: int, batch: int, kind: str) -> str | None:
        """Why not to try on a CPU, whose memory matrices of tokens by tokens may well exceed."""
        tokens, forward = (size // 16) ** 2, kind == 'forward'
        if self.device.type != 'cpu':
            return None
        if self.family == 'quadratic':
            maps, heads = 4 if forward else 16, self.model.heads
        elif 'naive' in self.options and self.arch in DEIT:
            depth, heads = DEIT[self.arch]
            maps, tokens = 2 if forward else 2 * depth + 2, tokens + 1  # scores and their softmax
        else:
            return None
        need = maps * batch * heads * tokens**2 * 4
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
