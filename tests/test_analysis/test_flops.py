"""What torch's and mmengine's FLOP counters find, against sums written from the architectures."""

import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, complexity_analysis, get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionseq_mm import ops
from visionseq_mm.backbones import SecViT, ViL, Vim
from visionseq_mm.backbones.vil import Path as RowByRow
from visionseq_mm.backbones.vil import ViLLayer
from visionseq_mm.compat import flop_handles

pytestmark = pytest.mark.usefixtures('one_thread', 'nothing_to_compile')

BATCH = 2
IMAGE = (48, 80)
TOKENS = 3 * 5
PYRAMID_IMAGE = (64, 96)  # grids 16x24, 8x12, 4x6, 2x3


@pytest.fixture
def nothing_to_compile(monkeypatch):
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')


@dataclass
class Work:
    """Of one image: multiply-adds, operations of scans, elements of LayerNorms and of BNs."""

    products: int = 0
    scans: int = 0
    normed: int = 0
    batch_normed: int = 0

    def torch(self):
        return BATCH * (2 * self.products + self.scans)

    def mmengine(self):
        """It counts 5 for an element of a layer or group norm, 2 for one of BN in eval mode."""
        norms = 5 * self.normed + 2 * self.batch_normed
        return BATCH * (self.products + self.scans + norms)


def conv(pixels, c_in, c_out, kernel, groups=1):
    return pixels * c_out * (c_in // groups) * kernel**2


def vim(D, blocks, directions, grid=TOKENS, class_tokens=0):
    L, E, N, R = grid + class_tokens, 2 * D, 16, math.ceil(D / 16)
    in_out = L * (D * 2 * E + E * D)
    one_way = L * E * (4 + (R + 2 * N) + R)  # taps, x_proj, dt_proj
    scan = directions * L * E * (9 * N + 1) + L * E  # the 1: skip connection; L E: gate
    return Work(
        products=conv(grid, 3, D, 16) + blocks * (in_out + directions * one_way),
        scans=blocks * scan,
    )


@dataclass
class Layer:
    """Multiply-adds of a ViL layer: before the cell, of the cell, and of the projection down."""

    before: int
    cell: int
    down: int

    @classmethod
    def of(cls, L, D, taps):
        E, H = 2 * D, 4
        Dh = E // H
        return cls(
            L * (D * 2 * E + E * taps + 3 * E * 4 + 2 * 3 * E * H),
            2 * L * H * Dh * (Dh + 1),  # k (v, 1)ᵀ into the state, q with the state
            L * E * D,
        )


def vil(D, layers, taps):
    """The norm of the cells' output is within the layer's operation, and not counted."""
    L, layer = TOKENS, Layer.of(TOKENS, D, taps)
    products = conv(L, 3, D, 16) + layers * (layer.before + layer.cell + layer.down)
    return Work(products, normed=layers * L * D)


def secvit(widths, depths, clusters):
    height, width = PYRAMID_IMAGE
    C, half = widths[0], widths[0] // 2
    pixels, L = height * width // 4, height * width // 16
    work = Work(
        conv(pixels, 3, half, 3) + 2 * conv(pixels, half, half, 3) + conv(L, half, C, 3),
        batch_normed=3 * pixels * half + L * C,
    )
    for stage, (C, depth, K) in enumerate(zip(widths, depths, clusters, strict=True)):
        K = min(K, L)
        borders = [c * L // K for c in range(K + 1)]
        pairs = sum((b - a) ** 2 for a, b in pairwise(borders))
        work.products += depth * (
            conv(L, C, C, 3, groups=C)
            + conv(L, C, 3 * C, 1)
            + conv(L, C, C, 5, groups=C)
            + 2 * C * pairs  # q kᵀ and the weights with v, all heads
            + conv(L, C, C, 1)
            + conv(L, C, 3 * C, 1)
            + conv(L, 3 * C, 3 * C, 3, groups=3 * C)
            + conv(L, 3 * C, C, 1)
        )
        work.normed += depth * 2 * L * C
        if stage < 3:
            L //= 4
            work.products += conv(L, C, widths[stage + 1], 3)
            work.batch_normed += L * widths[stage + 1]
    return work


PLAIN = dict(embed_dims=32, depth=2)
PLAIN_ARGUMENTS = dict(arch=PLAIN, img_size=64, out_indices=(0, 1))
WIDTHS, DEPTHS, CLUSTERS = (16, 16, 32, 32), (1, 2, 1, 1), (4, 5, 2, 7)  # 7 are more than tokens
PYRAMID = dict(
    embed_dims=WIDTHS,
    depths=DEPTHS,
    num_heads=(2, 2, 4, 2),
    layer_scale=(False, False, True, True),
)

CASES = {
    **{
        f'vim-{kind}': (Vim, dict(PLAIN_ARGUMENTS, bidirectional=kind), vim(32, 2, directions))
        for kind, directions in dict(none=1, layer=1, ssm=2, ssm_conv=2).items()
    },
    'vim-stride8': (Vim, dict(PLAIN_ARGUMENTS, stride=8), vim(32, 2, 2, grid=5 * 9)),
    'vim-cls': (Vim, dict(arch=PLAIN, out_type='cls'), vim(32, 2, 2, class_tokens=1)),
    'vim-all-kept': (Vim, dict(PLAIN_ARGUMENTS, recompute='none'), vim(32, 2, 2)),
    'vil1': (ViL, dict(PLAIN_ARGUMENTS, version=1), vil(32, 2, taps=4)),
    'vil2': (ViL, PLAIN_ARGUMENTS, vil(32, 4, taps=9)),
    'secvit': (
        SecViT,
        dict(arch=PYRAMID, num_clusters=CLUSTERS),
        secvit(WIDTHS, DEPTHS, CLUSTERS),
    ),
}


def build(name):
    torch.manual_seed(0)
    cls, arguments, work = CASES[name]
    size = PYRAMID_IMAGE if cls is SecViT else IMAGE
    return cls(**arguments).eval(), torch.randn(BATCH, 3, *size), work


def count(model, *inputs, backward=False):
    """torch's counts by operation, and in all."""
    with FlopCounterMode(display=False) as counter:
        outputs = model(*inputs)
        if backward:
            sum(out.sum() for out in outputs).backward()
    counts = counter.get_flop_counts()['Global']
    return {str(op).split('.')[-1]: n for op, n in counts.items()}, counter.get_total_flops()


@pytest.mark.parametrize('name', CASES)
def test_torch(name):
    model, image, work = build(name)
    assert count(model, image)[1] == work.torch()


@pytest.mark.parametrize('name', CASES)
def test_mmengine(name):
    """As it comes: no handles are given."""
    model, image, work = build(name)
    found = get_model_complexity_info(model, inputs=(image,), show_table=False, show_arch=False)
    assert found['flops'] == work.mmengine()


@pytest.mark.parametrize('name', ['vim-ssm_conv', 'vil2', 'secvit'])
def test_all_our_ops_are_known(name):
    model, image, _ = build(name)
    analyzer = FlopAnalyzer(model, image)
    analyzer.total()
    assert not [op for op in analyzer.unsupported_ops() if op.startswith('visionseq_mm')]


@pytest.mark.parametrize(
    'name, op, ratio',
    [
        ('vim-ssm_conv', 'vim_mixer', 3),
        ('secvit', 'sec_attention', 2.5),
        ('secvit', 'depthwise_conv2d', 2),
    ],
)
def test_backward(name, op, ratio):
    """With what is computed again: all of a mixer, an attention's weights, nothing else."""
    model, image, _ = build(name)
    forward = count(model, image)[0][op]
    counts = count(model, image, backward=True)[0]
    assert counts[op] == forward > 0
    assert counts[f'{op}_backward'] == ratio * forward


@pytest.mark.parametrize('recompute', ['kernel', 'none'])
def test_backward_of_vil(recompute):
    """With what is computed again: the cells' states, and what is before them if not kept."""
    layer = Layer.of(TOKENS, 32, taps=9)
    model = ViL(**PLAIN_ARGUMENTS, recompute=recompute)
    counts = count(model, torch.randn(BATCH, 3, *IMAGE), backward=True)[0]
    forward = 2 * (layer.before + layer.cell + layer.down)
    again = layer.cell + (2 * layer.before if recompute == 'kernel' else 0)
    assert counts['vil_mixer'] == 4 * BATCH * forward
    assert counts['vil_mixer_backward'] == 4 * BATCH * (2 * forward + again)


def test_vil_layer_beside_the_official_operations(monkeypatch):
    """As torch counts these one by one, but for the cell, which is quadratic there."""
    monkeypatch.syspath_prepend(
        Path(__file__).parents[2]
    )  # `benchmarks` is no part of the package
    from benchmarks import peers

    L, D = TOKENS, 32
    layer = ViLLayer(D, 2, (RowByRow(),), shared=False, recompute=True)
    tokens = torch.randn(BATCH, L, D)
    official = peers.vil_mixer(dict(tokens=tokens, **dict(layer.named_parameters())))
    with FlopCounterMode(display=False) as counter:
        official()
    scores, cell = 2 * L * L * 2 * D, Layer.of(L, D, 9).cell
    assert count(layer, tokens, (3, 5))[1] == counter.get_total_flops() + 2 * BATCH * (
        cell - scores
    )


@pytest.mark.parametrize('arch, published', dict(tiny=1.5, small=5.1, base=18.6).items())
def test_published_figures_of_vil(arch, published):
    """Of the paper, in G at 224×224; they have one product of tokens by tokens for a cell."""
    with torch.device('meta'):
        model, image = ViL(arch, out_indices=-1).eval(), torch.empty(1, 3, 224, 224)
    L, D = 14 * 14, model.embed_dims
    products = count(model, image)[1] // 2
    products += 24 * (L * L * 2 * D - Layer.of(L, D, 9).cell)
    assert products == pytest.approx(1e9 * published, rel=0.01)


@pytest.mark.parametrize('size, published', {224: 2.71, 512: 18.8}.items())
def test_published_figures_of_secvit(size, published):
    """Of the official network, in G, attention and the projection before its head included."""
    with torch.device('meta'):
        model, image = SecViT('tiny', out_type='cls').eval(), torch.empty(1, 3, size, size)
    assert count(model, image)[1] // 2 == pytest.approx(1e9 * published, rel=0.003)


def test_published_figures_of_secvit_by_mmengine():
    model, image = SecViT('tiny', out_type='cls').eval(), torch.empty(1, 3, 224, 224)
    counts = FlopAnalyzer(model, image).by_operator()
    products = sum(n for op, n in counts.items() if 'norm' not in op)
    assert products == pytest.approx(2.71e9, rel=0.003)


class Cell(nn.Module):
    """The op that no backbone calls by itself."""

    def forward(self, x):
        gate = x[..., 0]
        return ops.mlstm(x, x, x, gate, gate)


def test_cell():
    B, S, H, Dh = shape = BATCH, 7, 2, 5
    x = torch.randn(shape, requires_grad=True)
    cell = 2 * B * S * H * Dh * (Dh + 1)
    counts = count(Cell(), x, backward=True)[0]
    assert counts == dict(mlstm=2 * cell, mlstm_backward=5 * cell)
    assert FlopAnalyzer(Cell(), x.detach()).by_operator() == dict(mlstm=cell)


class Scan(nn.Module):
    """The ops that no backbone calls by themselves."""

    def __init__(self, skip, gate):
        super().__init__()
        self.skip, self.gate = skip, gate

    def forward(self, x):
        channels, states = x.shape[-1], 3
        u = ops.conv1d_silu(x, x.new_ones(2, channels, 4), x.new_ones(2, channels))[0]
        A = -x.new_ones(channels, states)
        B = x[..., :states]
        D = x.new_ones(channels) if self.skip else None
        return ops.selective_scan(u, x, A, B, B, D, x if self.gate else None)


@pytest.mark.parametrize('skip, gate', [(False, False), (True, False), (False, True)])
def test_scan_and_convolution(skip, gate):
    elements = BATCH * 7 * 8
    taps, scan = 2 * 4 * elements, (9 * 3 + skip + gate) * elements
    x = torch.randn(BATCH, 7, 8)
    model = Scan(skip, gate)
    assert count(model, x)[0] == dict(conv1d_silu=2 * taps, selective_scan=scan)
    assert FlopAnalyzer(model, x).by_operator() == dict(conv1d_silu=taps, selective_scan=scan)


def test_registry_alone_is_enough():
    """And imports neither the ops nor what counts them before a trace has one."""
    script = """if True:
        import sys
        import visionseq_mm.registry
        for name in ('visionseq_mm.ops', 'visionseq_mm.analysis', 'torch.utils.flop_counter'):
            assert name not in sys.modules, name
        from mmengine.analysis import complexity_analysis
        ops = ('vim_mixer', 'vil_mixer', 'mlstm', 'sec_attention', 'sec_partition')
        for op in (*ops, 'depthwise_conv2d', 'rotary_2d'):
            assert f'visionseq_mm::{op}' in complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS, op
    """
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_handles_of_others_stay(monkeypatch):
    table = {'visionseq_mm::mlstm': len}
    monkeypatch.setattr(complexity_analysis, '_DEFAULT_SUPPORTED_FLOP_OPS', table)
    flop_handles.install()
    assert table['visionseq_mm::mlstm'] is len
    assert len(table) == 9


def test_mmengine_without_a_table(monkeypatch):
    monkeypatch.delattr(complexity_analysis, '_DEFAULT_SUPPORTED_FLOP_OPS')
    flop_handles.install()
