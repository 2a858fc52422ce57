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
    *('op', 'shape', 'dtype', 'kind', 'contestant', 'backend', 'floor_ms', 'peak_mib'),
    *('kept_mib', 'error_out', 'error_grad', 'error_grad_of', 'agrees'),
}
BACKBONES = TIMING | {
    *('model', 'size', 'batch', 'kind', 'dtype', 'autocast', 'backend', 'images_per_second'),
    *('peak_mib', 'table', 'limit'),
}
REACH = {
    *('row', 'peer', 'kind', 'what', 'least', 'goal', 'ours', 'theirs', 'unit', 'value'),
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
    """With stand-ins for the CUDA packages, and formulas that are not compiled."""
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

    contestants = dict(
        ours=ours, same=ours, tenth=ops.Contestant(tenth_off), nan=ops.Contestant(nan)
    )
    table = {'op': ops.Op(right.inputs, contestants, right.activations)}
    monkeypatch.setattr(ops, 'OPS', table)
    cpu = torch.device('cpu')
    rows = ops.compare('op', ops.Shape(1, 9, 8), torch.float32, cpu, 0.001, 'reference')
    found = {row['contestant']: row for row in rows}
    assert found['same']['agrees'] and not found['tenth']['agrees'] and not found['nan']['agrees']
    assert found['tenth']['error_out'] == pytest.approx(0.1, rel=1e-3)
    assert found['tenth']['error_grad'] == pytest.approx(0.1, rel=1e-3)


def test_backbones(tmp_path):
    arguments = '--sizes 96 --passes forward --recompute 0 --models vim-tiny deit-tiny:naive'
    printed, data = run('backbones', tmp_path, *arguments.split())
    vim, deit = data['results']
    assert set(vim) == set(deit) == BACKBONES
    assert (vim['model'], deit['model']) == ('vim-tiny', 'deit-tiny:naive')
    for row in (vim, deit):
        assert row['status'] == 'ok' and row['size'] == 96 and row['dtype'] == 'float32'
        assert row['images_per_second'] == pytest.approx(1e3 / row['median_ms'])
        assert 0 < row['peak_mib'] < 500
        assert f'| {row["model"]} |' in printed
    assert deit['ratio'] == pytest.approx(deit['median_ms'] / vim['median_ms'])
    assert len(data['notes']) == 1 and 'vim-tiny passes deit-tiny:naive' in data['notes'][0]


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
