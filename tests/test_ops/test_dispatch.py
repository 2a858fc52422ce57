import pytest
import torch

from visionseq_mm.ops import dispatch
from visionseq_mm.ops.dispatch import ENV, Backends
from visionseq_mm.ops.selective_scan import cpu, reference

PACKAGE = 'visionseq_mm.ops.selective_scan'
X = torch.zeros(1)


@pytest.fixture
def backends(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(dispatch, 'INSTALLED', dict(numba=True, triton=True))
    return Backends('op', PACKAGE, 'reference', 'cpu', 'triton')


def test_auto_is_the_best_for_the_tensor(backends):
    assert backends.select(None, X) == backends.select('auto', X) == 'cpu'
    assert backends.select('auto', X.to('meta')) == 'reference'
    assert backends['cpu'] is cpu
    assert backends['reference'] is reference


def test_auto_without_numba(backends, monkeypatch):
    monkeypatch.setattr(dispatch, 'INSTALLED', dict(numba=False, triton=True))
    assert backends.select('auto', X) == 'reference'
    with pytest.raises(ValueError, match=r"backend='cpu' is not available.*needs Numba: pip"):
        backends.select('cpu', X)


def test_an_old_triton(backends, monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setattr(dispatch, '_triton_version', lambda: '3.3.1')
    with pytest.raises(ValueError, match=r'needs Triton 3\.4, which torch 2\.8 .*found 3\.3\.1'):
        backends.select('triton', X)
    monkeypatch.setattr(dispatch, '_triton_version', lambda: '3.10.0')
    assert backends.select('triton', X) == 'triton'


def test_the_interpreter_is_for_those_who_ask(backends, monkeypatch):
    with pytest.raises(ValueError, match=r"backend='triton'.*needs inputs on a GPU, or on a"):
        backends.select('triton', X)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert backends.select('triton', X) == 'triton'
    assert backends.select('auto', X) == 'cpu'
    with pytest.raises(ValueError, match='has no float64'):
        backends.select('triton', X.double())


def test_limits_of_an_op(backends):
    limits = dict(cpu='takes at most 3 things, got 4')
    assert backends.select('auto', X, **limits) == 'reference'
    with pytest.raises(ValueError, match='it takes at most 3 things, got 4'):
        backends.select('cpu', X, **limits)


def test_argument_before_environment(backends, monkeypatch):
    monkeypatch.setenv(ENV, 'reference')
    assert backends.select(None, X) == 'reference'
    assert backends.select('cpu', X) == 'cpu'
    assert backends.select('auto', X) == 'cpu'


def test_empty_environment_is_auto(backends, monkeypatch):
    monkeypatch.setenv(ENV, '')
    assert backends.select(None, X) == 'cpu'


def test_unknown(backends, monkeypatch):
    choices = r"choose one of \['auto', 'reference', 'cpu'\]"
    with pytest.raises(ValueError, match=rf"op: backend='cuda' is unknown; {choices}"):
        backends.select('cuda', X)
    monkeypatch.setenv(ENV, 'cuda')
    with pytest.raises(ValueError, match=rf"op: VISIONSEQ_BACKEND='cuda' is unknown; {choices}"):
        backends.select(None, X)


def test_not_written_for_an_op():
    with pytest.raises(ValueError, match=r"'cpu' is unknown; choose one of \['auto', 'reference'"):
        Backends('op', PACKAGE, 'reference').select('cpu', X)
