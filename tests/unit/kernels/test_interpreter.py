"""Runs tests/unit/kernels/interpreted in Triton's interpreter, in processes of their own (see the conftest.py there)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # a suite is one test here

FOLDER = Path(__file__).parent / "interpreted"
SUITES = {
    "test_masks.py": 180,
    "test_features.py": 70,
    "test_operators.py": 10,
    "test_rows.py": 25,
    "test_training.py": 2,
}  # and at least so many cases


@pytest.mark.parametrize("suite", SUITES)
def test_the_kernels_are_right_in_the_interpreter(suite: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / suite)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= SUITES[suite], run.stdout[-500:]


def test_every_suite_is_run() -> None:
    assert {path.name for path in FOLDER.glob("test_*.py")} == set(SUITES)
