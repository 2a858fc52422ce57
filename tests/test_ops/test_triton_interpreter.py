"""Triton's kernels without a GPU, in a process of their own: the interpreter replaces the
compiler for as long as a process lives."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version


def test_triton_interpreter():
    triton = pytest.importorskip('triton')
    if Version(triton.__version__) < Version('3.7') and Version(numpy.__version__) >= Version(
        '2.4'
    ):
        pytest.skip('the interpreter of Triton 3.6 cannot count to a variable in NumPy 2.4')
    folder = Path(__file__).parent / 'triton_interpreter'
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', folder]
    environment = {**os.environ, 'TRITON_INTERPRET': '1'}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
