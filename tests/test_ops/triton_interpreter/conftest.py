"""Triton decides when it is imported; `test_triton_interpreter.py` collects this folder anew."""

import os

if os.environ.get('TRITON_INTERPRET') != '1':
    collect_ignore_glob = ['*']
