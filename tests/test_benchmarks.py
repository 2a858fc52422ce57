"""The benchmark programs as a user runs them, at tiny sizes; what they conclude from numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STAND_INS = Path(__file__).parent / 'peer_stand_ins'
TIMING = {'status', 'median_ms', 'low_ms', 'high_ms', 'runs', 'ratio'}
OPS = TIMING | {
    *('op', 'shape', 'dtype', 'kind', 'contestant', 'backend', 'floor_ms', 'floor_of', 'peak_mib'),
    *('kept_mib', 'error_out', 'error_grad', 'error_grad_of', 'agrees', 'differs'),
}
BACKBONES = TIMING | {
    *('model', 'size', 'batch', 'kind', 'dtype', 'autocast', 'backend', 'images_per_second'),
    *('peak_mib', 'table', 'limit'),
}
REACH = {
    *('row', 'peer', 'kind', 'what', 'least', 'goal', 'most', 'ours', 'theirs', 'unit', 'value'),
    *('status', 'reached', 'measured'),
}


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder is no part of the package."""
    monkeypatch.syspath_prepend(ROOT)


def run(module, tmp_path, *arguments, **environment):
    """(what was printed, the JSON) of a program on one CPU thread and the reference backend."""
    file = tmp_path / 'out.json'
    options = ['--device', 'cpu', '--threads', '1', '--seconds', '0.01', '--json', str(file)]
    done = subprocess.run(
        [sys.executable, '-m', f'benchmarks.{module}', *options, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
            'VISIONSEQ_BACKEND': 'reference',
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    assert data['device']['type'] == 'cpu' and data['device']['threads'] == 1
    assert data['versions']['torch'] == torch.__version__
    assert data['commit'] and data['date']
    assert data['command'].startswith(f'python -m benchmarks.{module} --device cpu')
    return done.stdout, data


def test_ops_agree_with_every_peer(tmp_path, benchmarks):
    """With stand-ins for the GPU packages, and formulas that are not compiled."""
    from benchmarks import ops

    printed, data = run(
        *('ops', tmp_path, '--shape', '2x20x16x4'),
        PYTHONPATH=str(STAND_INS),
        TORCH_COMPILE_DISABLE='1',
    )
    rows = data['results']
    assert all(set(row) == OPS for row in rows)
    assert [row['contestant'] for row in rows if row['status'] != 'ok'] == []
    assert [(row['op'], row['kind'], row['contestant']) for row in rows] == [
        (name, kind, contestant)
        for name, op in ops.OPS.items()
        for kind in (['forward'] if name == 'sec_partition' else ['forward', 'step'])
        for contestant in op.contestants
    ]
    for row in rows:
        assert 0 < row['low_ms'] <= row['median_ms'] <= row['high_ms'] and row['runs'] >= 3
        keeps = 'compile' not in row['contestant']
        keeps = keeps and row['op'] not in ('sec_partition', 'rotary_2d')
        assert row['kept_mib'] or not keeps
        assert f'| {row["contestant"]} |' in printed
        if row['contestant'] == 'ours':
            assert row['ratio'] == 1 and row['agrees'] is None
        elif row['contestant'] == 'fla simple_gla':
            assert row['differs'] and row['agrees'] is row['error_out'] is None
            assert f'| not compared: {row["differs"]} |' in printed
        elif row['contestant'] == 'mlstm-kernels':
            assert row['agrees'] and row['error_out'] < 1e-5 and row['error_grad'] is None
            assert f', not compared: {row["differs"]} |' in printed
        elif row['op'] == 'sec_partition':
            assert row['agrees'] and row['error_out'] == 0 and row['error_grad'] is None
        else:
            assert row['agrees'] and max(row['error_out'], row['error_grad']) < 1e-5


def test_partitions_are_compared_by_cluster(benchmarks, monkeypatch):
    """The order inside a cluster does not matter, and a few tokens at a border do not either."""
    from functools import partial

    from benchmarks import ops, peers

    right = ops.OPS['sec_partition']
    shape, K = ops.Shape(2, 1000, 16, 4), 4

    def other_order(p, way):
        idx = peers.by_name(peers.official_partition)(p)()[0].unflatten(2, (K, -1))
        return lambda: way(idx)

    ways = dict(
        turned=lambda idx: idx.flip(3).flatten(2),  # inside each cluster
        reversed=lambda idx: idx.flatten(2).flip(2),
        shifted=lambda idx: idx.flatten(2).roll(1, 2),  # each cluster has one token of the next
        border=lambda idx: idx.index_put(
            (torch.tensor(0), torch.tensor(0), torch.tensor([0, 1]), torch.tensor([249, 0])),
            idx[0, 0, [1, 0], [0, 249]],
        ).flatten(2),
    )
    contestants = {
        name: ops.Contestant(partial(other_order, way=way), peers.heads_first)
        for name, way in ways.items()
    }
    contestants = dict(ours=right.contestants['ours'], **contestants)
    table = {'op': replace(right, contestants=contestants)}
    monkeypatch.setattr(ops, 'OPS', table)
    cpu = torch.device('cpu')
    rows = ops.compare('op', shape, torch.float32, cpu, 0.001, 'reference')
    found = {row['contestant']: (row['agrees'], row['error_out']) for row in rows}
    assert {row['kind'] for row in rows} == {'forward'} and len(rows) == 5
    assert found['turned'] == (True, 0)
    assert found['border'] == (True, 2 / 4000)
    assert found['shifted'] == (False, 4 * 4 / 4000) and not found['reversed'][0]


@pytest.mark.parametrize('K', [1, 4])
def test_attention_peers_against_one_cluster_at_a_time(benchmarks, K):
    """In float64, whole and with an order that is given."""
    from benchmarks import peers
    from visionseq_mm.ops import cluster_attention, sec_partition

    torch.manual_seed(0)
    inputs = [torch.randn(2, 40, 3, 8, dtype=torch.float64) for _ in 'qkvl']
    q, k, v, lepe = (x.requires_grad_() for x in inputs)
    idx = sec_partition(k, K, backend='reference').long()
    expected = cluster_attention(q, k, v, K, backend='reference', lepe=lepe)
    dout = torch.randn_like(expected)
    expected = [expected, *torch.autograd.grad(expected, inputs, dout)]
    for peer in (peers.official_attention, peers.gathered_attention):
        for order in (None, idx):
            out = peer(*(x.transpose(1, 2) for x in (q, k, v)), K, lepe.transpose(1, 2), order)
            out = out.transpose(1, 2)
            found = [out, *torch.autograd.grad(out, inputs, dout)]
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_what_is_not_installed_is_said(benchmarks, monkeypatch):
    from benchmarks import ops

    monkeypatch.setitem(sys.modules, 'causal_conv1d', None)
    peer, cpu = 'causal-conv1d twice', torch.device('cpu')
    rows = ops.compare(
        'conv1d_silu', ops.Shape(1, 9, 8), torch.float32, cpu, 0.001, 'reference', [peer]
    )
    found = {(row['contestant'], row['kind']): row['status'] for row in rows}
    assert found == {
        ('ours', 'forward'): 'ok',
        ('ours', 'step'): 'ok',
        (peer, 'forward'): 'not installed: causal_conv1d',
        (peer, 'step'): 'not installed: causal_conv1d',
    }


def test_a_wrong_peer_is_noticed(benchmarks, monkeypatch):
    from benchmarks import ops

    right = ops.OPS['conv1d_silu']
    ours = right.contestants['ours']

    def tenth_off(p):
        call = ours.build(p)
        return lambda: 1.1 * call()

    def nan(p):
        call = ours.build(p)
        return lambda: call() * torch.nan

    class WrongGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return 2 * dx

    def doubled(p):
        call = ours.build(p)
        return lambda: WrongGradients.apply(call())

    contestants = dict(
        ours=ours,
        same=ours,
        tenth=ops.Contestant(tenth_off),
        nan=ops.Contestant(nan),
        doubled=ops.Contestant(doubled),
        known=ops.Contestant(doubled, other_gradients='known'),
        tenth_known=ops.Contestant(tenth_off, other_gradients='known'),
        other=ops.Contestant(nan, differs='another'),
    )
    table = {'op': ops.Op(right.inputs, contestants, right.activations)}
    monkeypatch.setattr(ops, 'OPS', table)
    cpu = torch.device('cpu')
    rows = ops.compare('op', ops.Shape(1, 9, 8), torch.float32, cpu, 0.001, 'reference')
    found = {row['contestant']: row for row in rows}
    assert found['same']['agrees'] and not found['tenth']['agrees'] and not found['nan']['agrees']
    assert not found['doubled']['agrees'] and not found['tenth_known']['agrees']
    assert found['known']['agrees'] and found['known']['error_grad'] is None
    assert found['other']['agrees'] is None and found['other']['differs'] == 'another'
    assert found['tenth']['error_out'] == pytest.approx(0.1, rel=1e-3)
    assert found['tenth']['error_grad'] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize('chunk', [1, 4, 21])
def test_plain_mlstm(benchmarks, chunk):
    """Of several chunks, the last one shorter."""
    from benchmarks import ops, peers
    from visionseq_mm.ops import mlstm

    inputs = ops.mlstm_inputs(ops.Shape(2, 21, 16), torch.float64)
    inputs = [x.double().requires_grad_() for x in inputs.values()]
    expected, found = mlstm(*inputs, backend='reference'), peers.plain_mlstm(*inputs, chunk)
    assert found.dtype == torch.float64
    dout = torch.randn_like(expected)
    pairs = zip(
        (expected, *torch.autograd.grad(expected, inputs, dout)),
        (found, *torch.autograd.grad(found, inputs, dout)),
        strict=True,
    )
    assert max(ops.rms_error(y, x) for x, y in pairs) < 1e-5


def test_floors(benchmarks, monkeypatch):
    """Of an H200 and Shapes of ViL, beside µs derived by hand from 4.3 TB/s."""
    from types import SimpleNamespace

    from benchmarks import ops

    properties = SimpleNamespace(
        memory_clock_rate=3_201_000, memory_bus_width=6144, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)
    monkeypatch.setattr(ops.common, 'nvidia_smi', lambda field: '1980')
    cuda = torch.device('cuda')
    assert ops.byte_rate(cuda) == pytest.approx(4.3e12, rel=1e-2)

    def floors(name, *shapes):
        return [1e3 * ops.floor_ms(ops.OPS[name], s, torch.bfloat16, cuda) for s in shapes]

    shapes = ops.VIL_SHAPES['cuda']
    # Four tensors, and the states of 16 chunks of 256 tokens twice.
    assert floors('mlstm', *shapes) == pytest.approx([23 + 4.5, 47 + 18, 94 + 70], rel=0.03)
    assert floors('vil_pre', *shapes) == pytest.approx([29, 59, 117], rel=0.03)
    assert floors('vil_post', *shapes) == pytest.approx([23, 47, 94], rel=0.03)
    assert floors('bidirectional_scan', ops.Shape(8, 4096, 384)) == pytest.approx([96], rel=0.01)
    stages = ops.SEC_SHAPES['cuda']
    of_exps = [us * 1.9 / 1.98 for us in (535, 268, 134, 33)]  # derived for a clock of 1.9 GHz
    for name in ('sec_attention', 'cluster_attention'):
        assert floors(name, *stages) == pytest.approx(of_exps, rel=0.02)
    step = ops.floor_ms(ops.OPS['sec_attention'], stages[0], torch.bfloat16, cuda, 'step')
    assert 1e3 * step == pytest.approx(3 * of_exps[0], rel=0.02)
    assert floors('sec_partition', *stages[:1]) == pytest.approx([32], rel=0.02)
    assert floors('rotary_2d', *stages[:1]) == pytest.approx([63], rel=0.02)
    assert floors('depthwise_5x5', *stages[:1]) == pytest.approx([31], rel=0.02)
    assert floors('depthwise_3x3', *ops.FFN_SHAPES['cuda'][:1]) == pytest.approx([94], rel=0.02)
    assert ops.floor_ms(ops.OPS['mlstm'], shapes[0], torch.bfloat16, cuda, 'step') is None
    assert ops.floor_ms(ops.OPS['vil_mixer'], shapes[0], torch.bfloat16, cuda) is None
    assert ops.floor_ms(ops.OPS['mlstm'], shapes[0], torch.float32, torch.device('cpu')) is None
    row = dict(median_ms=3.0, floor_ms=2.0, floor_of='HBM')
    assert ops.floor_cell(row) == '1.50 (HBM)' and ops.floor_cell(row | dict(floor_ms=None)) == ''


def test_backbones(tmp_path):
    models = ['vil-tiny', 'deit-tiny:naive', 'quadratic-tiny']
    arguments = '--sizes 224 --passes forward --recompute 0 --models'
    printed, data = run('backbones', tmp_path, *arguments.split(), *models)
    vil, deit, _ = data['results']
    assert [row['model'] for row in data['results']] == models
    for row in data['results']:
        assert set(row) == BACKBONES
        assert row['status'] == 'ok' and row['size'] == 224 and row['dtype'] == 'float32'
        assert row['images_per_second'] == pytest.approx(1e3 / row['median_ms'])
        assert 0 < row['peak_mib'] < 500
        assert f'| {row["model"]} |' in printed
    assert deit['ratio'] == pytest.approx(deit['median_ms'] / vil['median_ms'])
    assert len(data['notes']) == 1 and 'vil-tiny passes deit-tiny:naive' in data['notes'][0]


def test_labels(benchmarks):
    from benchmarks.models import Runner
    from visionseq_mm.backbones import ViL

    cpu = torch.device('cpu')
    runner = Runner('vil-tiny:reference:none', cpu, 'float32')
    assert isinstance(runner.model, ViL) and runner.model.version == 2
    assert runner.ours and runner.backend == 'reference' and runner.repeats == 1
    assert not runner.model.blocks[0].rowwise_from_top_left.layer.recompute
    with pytest.raises(ValueError, match='ViL takes one of'):
        Runner('vil-tiny:sdpa', cpu, 'float32')
    with pytest.raises(ValueError, match='takes no options'):
        Runner('quadratic-tiny:cpu', cpu, 'float32')
    with pytest.raises(ValueError, match='swin_tiny_patch4_window7_224 takes one of'):
        Runner('swin-tiny:cpu', cpu, 'float32')
    runner = Runner('secvit-tiny:kernel', cpu, 'float32')
    assert runner.ours and runner.model.recompute and len(runner.model.out_indices) == 4
    runner = Runner('secvit-tiny:with_cp', cpu, 'float32')
    assert runner.model.with_cp and not runner.model.recompute


@pytest.mark.parametrize(
    'label, channels',
    [
        ('secvit-tiny', [64, 128, 256, 512]),
        ('sec-swin-tiny', [96, 192, 384, 768]),
        ('swin-tiny', [96, 192, 384, 768]),
    ],
)
def test_pyramids(benchmarks, one_thread, monkeypatch, label, channels):
    """Four maps of an image that is no square."""
    from benchmarks.models import Runner

    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    runner = Runner(label, torch.device('cpu'), 'float32')
    with torch.no_grad():
        maps = runner._features(runner.image((64, 96), 2))
    last = 3 if label == 'swin-tiny' else 1
    assert [x.shape[last] for x in maps] == channels
    strides = [4, 8, 16, 32]
    assert [x.numel() for x in maps] == [
        2 * C * (64 // s) * (96 // s) for C, s in zip(channels, strides, strict=True)
    ]


def test_windows(benchmarks):
    """Beside an attention of all tokens with a mask; zeros around the grid count as tokens."""
    import timm
    from torch import nn

    from benchmarks.models import Runner, Windows

    torch.manual_seed(0)
    attention = timm.layers.Attention(8, 2, qkv_bias=True)
    windows = Windows(attention, 3)
    windows.grid = 5, 7
    x = torch.randn(2, 35, 8)
    padded = nn.functional.pad(x.view(2, 5, 7, 8), (0, 0, 0, 2, 0, 1))
    window = torch.arange(6)[:, None] // 3 * 3 + torch.arange(9) // 3
    same = window.flatten()[:, None] == window.flatten()
    expected = attention(padded.flatten(1, 2), attn_mask=same).view(2, 6, 9, 8)[:, :5, :7]
    torch.testing.assert_close(windows(x), expected.flatten(1, 2))

    runner = Runner('vitdet-deit-small', torch.device('cpu'), 'float32')
    blocks = runner.model.vit.blocks
    everywhere = [i for i, block in enumerate(blocks) if not isinstance(block.attn, Windows)]
    assert everywhere == [2, 5, 8, 11]
    with torch.no_grad():
        (tokens,) = runner._features(runner.image((48, 80), 1))
    assert tokens.shape == (1, 15, 384) and blocks[0].attn.grid == (3, 5)


def test_official_attention_of_all_layers(benchmarks, monkeypatch):
    """At the four stages of a SecViT-T, as many times as there are layers."""
    from benchmarks import models, peers

    cpu, calls = torch.device('cpu'), []

    def counted(q, k, v, K):
        calls.append((*q.shape, K))
        assert q.shape == k.shape == v.shape
        return q * k * v

    monkeypatch.setattr(peers, 'official_attention', counted)
    runner = models.Runner('official-attention-tiny', cpu, 'float32')
    assert runner.repeats == 1 and not runner.ours
    for call in (runner.forward, runner.step):
        call(runner.image((256, 192), 2))
        stages = [(2, 3072, 32), (4, 768, 8), (8, 192, 2), (16, 48, 1)]
        assert calls == [
            (2, H, L, 32, K)
            for (H, L, K), depth in zip(stages, (2, 2, 9, 2), strict=True)
            for _ in range(depth)
        ]
        calls.clear()
    assert runner.model.bytes(1024, 1, True) == 2 * 2**30
    assert runner.obstacle(2**14, 1, 'forward').startswith('not run: attention maps of ')


def test_quadratic_cells(benchmarks, monkeypatch):
    """One cell runs, forward or forward and backward; its time counts 24 times."""
    from benchmarks import backbones, models, peers

    cpu, calls, quadratic = torch.device('cpu'), [], peers.quadratic_mlstm

    def counted(*inputs):
        calls.append([tuple(x.shape) for x in inputs])
        return quadratic(*inputs)

    monkeypatch.setattr(peers, 'quadratic_mlstm', counted)
    monkeypatch.setattr(backbones, 'peak', lambda *args: 1.0)
    runner = models.Runner('quadratic-small', cpu, 'float32')
    assert runner.obstacle(64, 1, 'step') is None and not runner.ours
    assert runner.obstacle(2**14, 1, 'forward').startswith('not run: gates of ')
    timing = backbones.Timing(1.0, 0.5, 2.0, 7)
    monkeypatch.setattr(
        backbones, 'alternate', lambda calls, *rest: {k: f() or timing for k, f in calls.items()}
    )
    for kind in ('forward', 'step'):
        (row,) = backbones.compare([runner], 64, 2, kind, 0.01, 1)
        assert (row['median_ms'], row['low_ms'], row['high_ms'], row['runs']) == (24, 12, 48, 7)
        assert row['images_per_second'] == pytest.approx(2 / 24e-3)
    assert calls == 2 * [3 * [(2, 4, 16, 192)] + 2 * [(2, 4, 16)]]


def test_reach_says_what_it_had_no_time_for(benchmarks, one_thread, monkeypatch, tmp_path, capsys):
    from benchmarks import reach

    file = tmp_path / 'out.json'
    options = ['--device', 'cpu', '--threads', '1', '--minutes', '0', '--json', str(file)]
    monkeypatch.setattr(sys, 'argv', ['reach', *options])
    assert reach.main() == 0
    printed, data = capsys.readouterr().out, json.loads(file.read_text())
    assert all(set(row) == REACH for row in data['results'])
    assert {row['status'] for row in data['results']} == {'not run: 0 minutes were over'}
    assert len(data['results']) == printed.count('not run')


def test_reach_judges(benchmarks):
    from benchmarks import reach

    targets = (
        reach.Target('peer', 'step', least=2.0),
        reach.Target('peer', 'step', 'peak memory', least=2.0),
        reach.Target('peer', 'step', 'kept memory'),
        reach.Target('absent', 'step', least=2.0),
    )
    row = reach.BackboneRow(512, 1, targets)
    blank = dict(kind='step', status='ok', median_ms=None, peak_mib=None, kept_mib=None)
    measured = [
        dict(blank, label='ours', median_ms=10.0, peak_mib=100.0, kept_mib=5.0),
        dict(blank, label='peer', median_ms=25.0, peak_mib=150.0, kept_mib=20.0),
        dict(blank, label='absent', status='out of memory'),
    ]
    found = list(reach.judge(row, measured))
    assert [r['value'] for r in found] == [2.5, 1.5, 4.0, None]
    assert [r['reached'] for r in found] == [True, False, None, None]
    assert found[3]['status'] == 'out of memory'
    assert all(set(r) == REACH for r in found)


def test_reach_judges_what_is_to_be_less(benchmarks):
    """A floor, growth with the image, and what has no peer but is to fit."""
    from benchmarks import ops, reach

    shape = ops.Shape(1, 8, 8)
    row = reach.OpRow('mlstm', shape, (reach.Target(reach.FLOOR, 'forward', goal=1.6),))
    ours = dict(kind='forward', status='ok', label='ours', median_ms=3.0)
    floor = dict(ours, label='floor', median_ms=2.0, status='not known here')
    (found,) = reach.judge(row, [ours, floor])
    assert found['value'] == 1.5 and found['status'] == 'ok' and found['reached'] is None
    assert reach.ratio_cell(found) == '1.50 as much'
    (found,) = reach.judge(row, [ours, dict(floor, median_ms=None)])
    assert found['value'] is None and found['status'] == 'not known here'

    row = reach.GrowthRow(2048, 4.4, 'vil-tiny')
    peaks = [dict(label='ours', peak_mib=430.0), dict(label='at 1024²', peak_mib=100.0)]
    for factor, reached in ((1, True), (2, False)):
        peaks[0]['peak_mib'] = 430.0 * factor
        (found,) = reach.judge(row, [dict(p, kind='step', status='ok') for p in peaks])
        assert found['value'] == 4.3 * factor and found['reached'] is reached

    row = reach.BackboneRow(1024, 4, (reach.Target(None, 'step', 'peak memory'),), 'vil-base')
    ours = dict(kind='step', status='ok', label='ours', peak_mib=5.0)
    (found,) = reach.judge(row, [ours])
    assert found['reached'] and found['value'] is None and found['ours'] == 5
    assert reach.pair_cell(found) == '5.00 MiB' and reach.target_cell(found) == 'fits'
    (found,) = reach.judge(row, [dict(ours, peak_mib=None, status='out of memory')])
    assert found['reached'] is None and found['status'] == 'out of memory'


def test_sizes_that_are_no_squares(benchmarks, monkeypatch):
    import argparse

    from benchmarks import backbones, common, memory, models, reach

    assert common.parse_size('1024') == 1024 and common.parse_size('800x1333') == (800, 1333)
    assert common.size_name(1024) == '1024²' and common.size_name((800, 1333)) == '800×1333'
    for text in ('800x', '8x8x8', 'x', '0', '-8', 'large'):
        with pytest.raises(argparse.ArgumentTypeError, match='expected N or HxW'):
            common.parse_size(text)

    row = reach.GrowthRow((800, 1333), 4.4, 'secvit-tiny')
    assert str(row) == 'secvit-tiny, 1×3×800×1333' and row.targets[0].peer == 'at 400×667'
    assert reach.GrowthRow(2048, 4.4, 'vil-tiny').targets[0].peer == 'at 1024²'

    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, '{"added_mib": 7.0}', '')

    monkeypatch.setattr(memory.subprocess, 'run', run)
    runner = models.Runner('secvit-tiny', torch.device('cpu'), 'float32')
    assert runner.image((32, 64), 2).shape == (2, 3, 32, 64)
    assert backbones.peak(runner, (800, 1333), 1, 'step', 2) == 7
    command = ' '.join(commands[0])
    assert 'secvit-tiny --size 800x1333 --batch 1 --threads 2' in command
    assert command.endswith('--step')


def test_reach_measures(benchmarks, monkeypatch):
    """Rows of each kind, at tiny sizes."""
    from types import SimpleNamespace

    from benchmarks import ops, reach

    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    args = SimpleNamespace(seconds=0.001, threads=1, precision='float32')
    targets = (
        reach.Target('eager', 'forward', least=4.0),
        reach.Target(reach.FLOOR, 'forward', goal=1.4),
    )
    growth = reach.GrowthRow(96, 4.4, 'vil-tiny')
    peaks = {96: 9.0, 48: 3.0}
    monkeypatch.setattr(reach.backbones, 'peak', lambda runner, size, *rest: peaks[size])
    rows = [
        reach.OpRow('vil_post', ops.Shape(1, 12, 8), targets),
        reach.BackboneRow(48, 1, (reach.Target(None, 'forward'),), 'vil-tiny'),
        growth,
    ]
    found = [x for row in rows for x in reach.judge(row, row.measure(torch.device('cpu'), args))]
    assert [x['status'] for x in found] == ['ok', 'not known here', 'ok', 'ok']
    assert found[0]['value'] > 0 and found[2]['reached'] and found[3]['value'] == 3


def test_crossing_is_between_the_sizes_around_it(benchmarks):
    from benchmarks.backbones import crossings

    def rows(model, times):
        common = dict(model=model, kind='forward', batch=1, peak_mib=None)
        return [dict(common, size=s, median_ms=t) for s, t in times.items()]

    ours = rows('ours', {256: 4.0, 512: 16.0, 1024: 64.0})
    for factor, answer in ((2.0, '362 px (256–512'), (8.0, 'every size'), (0.05, 'no size up to')):
        # A peer whose time grows with the fourth power of the side.
        peer = rows('peer', {s: factor * (s / 256) ** 4 for s in (256, 512, 1024)})
        assert answer in crossings(ours + peer, 'ours', 'peer', 'forward')['time']


def test_slow_contestants_get_fewer_runs_and_failures_a_reason(benchmarks):
    import time

    from benchmarks.timing import alternate

    def absent():
        import no_such_package  # noqa: F401

    calls = dict(slow=lambda: time.sleep(0.02), fast=lambda: time.sleep(0.001), absent=absent)
    found = alternate(calls, torch.device('cpu'), seconds=0.06, runs=(2, 20))
    assert list(found) == list(calls)
    assert found['absent'] == 'not installed: no_such_package'
    assert 2 <= found['slow'].runs < found['fast'].runs <= 20
    assert found['slow'].median > 15 > found['fast'].low
