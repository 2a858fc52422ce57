from types import ModuleType

import pytest

from visionseq_mm.ops.dispatch import ENV, Backends

fast, slow = ModuleType('fast'), ModuleType('slow')


@pytest.fixture
def backends(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    return Backends('op', fast=fast, slow=slow)


def test_auto_is_the_first(backends):
    assert backends.select() == backends.select('auto') == 'fast'
    assert backends['slow'] is slow


def test_argument_before_environment(backends, monkeypatch):
    monkeypatch.setenv(ENV, 'slow')
    assert backends.select() == 'slow'
    assert backends.select('fast') == 'fast'
    assert backends.select('auto') == 'fast'


def test_empty_environment_is_auto(backends, monkeypatch):
    monkeypatch.setenv(ENV, '')
    assert backends.select() == 'fast'


def test_unavailable(backends, monkeypatch):
    with pytest.raises(ValueError, match=r"op: backend='triton'.*\['auto', 'fast', 'slow'\]"):
        backends.select('triton')
    monkeypatch.setenv(ENV, 'triton')
    with pytest.raises(ValueError, match=r"op: VISIONSEQ_BACKEND='triton'"):
        backends.select()
