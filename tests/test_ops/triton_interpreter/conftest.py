"""Triton decides when it is imported; `test_triton_interpreter.py` collects this folder anew."""

import os

import pytest

if os.environ.get('TRITON_INTERPRET') != '1':
    collect_ignore_glob = ['*']


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """Triton's interpreter patches its language for every call of a function from a kernel, a
    third of the time; here only where it is not patched. Of versions with other names: as it is.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not (hasattr(interpreter, '_patch_lang') and hasattr(interpreter, '_LangPatchScope')):
        return
    patch = interpreter._patch_lang

    def patch_once(fn):
        languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(x.load) for x in languages):
            return patch(fn)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, '_patch_lang', patch_once)
