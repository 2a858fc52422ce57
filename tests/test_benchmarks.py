"""The benchmark programs as a user runs them, at tiny sizes; what they conclude from numbers."""

import json
import os
import subprocess
import sys
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
        *('ops', tmp_path, '--shape', '2x21x16x4'),
        PYTHONPATH=str(STAND_INS),
        TORCH_COMPILE_DISABLE='1',
    )
    rows = data['results']
    assert all(set(row) == OPS for row in rows)
    assert [row['contestant'] for row in rows if row['status'] != 'ok'] == []
    assert [(row['op'], row['kind'], row['contestant']) for row in rows] == [
        (name, kind, contestant)
        for name, op in ops.OPS.items()
        for kind in ('forward', 'step')
        for contestant in op.contestants
    ]
    for row in rows:
        assert 0 < row['low_ms'] <= row['median_ms'] <= row['high_ms'] and row['runs'] >= 3
        assert row['kept_mib'] or 'compile' in row['contestant']
        assert f'| {row["contestant"]} |' in printed
        if row['contestant'] == 'ours':
            assert row['ratio'] == 1 and row['agrees'] is None
        elif row['contestant'] == 'fla simple_gla':
            assert row['differs'] and row['agrees'] is row['error_out'] is None
            assert f'| not compared: {row["differs"]} |' in printed
        elif row['contestant'] == 'mlstm-kernels':
            assert row['agrees'] and row['error_out'] < 1e-5 and row['error_grad'] is None
            assert f', not compared: {row["differs"]} |' in printed
        else:
            assert row['agrees'] and max(row['error_out'], row['error_grad']) < 1e-5


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
    assert ops.floor_ms(ops.OPS['vil_mixer'], shapes[0], torch.bfloat16, cuda) is None
    assert ops.floor_ms(ops.OPS['mlstm'], shapes[0], torch.float32, torch.device('cpu')) is None
    row = dict(median_ms=3.0, floor_ms=2.0, floor_of='HBM')
    assert ops.floor_cell(row) == '1.50 (HBM)' and ops.floor_cell(row | dict(floor_ms=None)) == ''


def test_backbones(tmp_path):
    models = ['vil-tiny', 'deit-tiny:naive', 'quadratic-tiny']
    arguments = '--sizes 96 --passes forward --recompute 0 --models'
    printed, data = run('backbones', tmp_path, *arguments.split(), *models)
    vil, deit, _ = data['results']
    assert [row['model'] for row in data['results']] == models
    for row in data['results']:
        assert set(row) == BACKBONES
        assert row['status'] == 'ok' and row['size'] == 96 and row['dtype'] == 'float32'
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
