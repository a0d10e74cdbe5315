"""These tests run Triton's kernels in its interpreter, which must be chosen before Triton is imported: test_interpreter.py starts them in a
process of their own. By hand: TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/interpreted
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_patch_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.7.1) puts itself into triton.language at every call of a device function; once a launch and module will do."""
    from triton.runtime import interpreter

    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def no_check_of_every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.7.1) does all arithmetic of integers twice, to see whether it overflows: 40 % of its time, and of such short rows
    no index comes near. Nor does it remember what a type is called in numpy.
    """
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    plain = interpreter._get_np_dtype
    known = functools.cache(plain)
    monkeypatch.setattr(interpreter, "_get_np_dtype", lambda kind: (plain if kind.scalar.is_ptr() else known)(kind.scalar))


@pytest.fixture
def descriptor_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.7.1) knows no sum into a descriptor's tile; it runs one program after another, so reading and writing will do."""
    from triton.runtime import interpreter

    def add(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        places, mask = desc.materialize_pointers(indices)
        there = self.create_masked_load(places, mask, None, None, None, False)
        self.create_masked_store(places, interpreter.TensorHandle(there.data + value.data, value.dtype.scalar), mask, None, None)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_reduce", add, raising=False)
