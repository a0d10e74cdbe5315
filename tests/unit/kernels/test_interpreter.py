"""Runs tests/unit/kernels/interpreted in Triton's interpreter, in two processes of their own side by side (see the conftest.py there)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # all suites are one test here

FOLDER = Path(__file__).parent / "interpreted"
# suite -> at least so many cases; halves of about the same length
HALVES = (
    {"test_masks.py": 20, "test_operators.py": 8, "test_rows.py": 25, "test_drop.py": 21},
    {"test_features.py": 20, "test_training.py": 2},
)
MORE = ({"test_masks.py": 20, "test_operators.py": 2}, {"test_features.py": 25, "test_training.py": 1})
REST = ({"test_masks.py": 135}, {"test_features.py": 20, "test_operators.py": 1})


@pytest.mark.parametrize(
    ("which", "halves"),
    [
        pytest.param("not slow and not long", HALVES, id="most"),
        pytest.param("long and not slow", MORE, marks=pytest.mark.long, id="more"),
        pytest.param("slow", REST, marks=pytest.mark.slow, id="the rest"),
    ],
)
def test_the_kernels_are_right_in_the_interpreter(which: str, halves: tuple[dict[str, int], ...]) -> None:
    # -vv: a line a case; pyproject's -q takes one v away
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-vv", "-m", which]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    runs = [
        subprocess.Popen(
            [*command, *(str(FOLDER / suite) for suite in half)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in halves
    ]
    try:
        said = [run.communicate()[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for half, run, text in zip(halves, runs, said, strict=True):
        assert run.returncode == 0, text[-8000:]
        for suite, least in half.items():
            assert len(re.findall(rf"{re.escape(suite)}::.* PASSED", text)) >= least, suite


def test_every_suite_is_run() -> None:
    assert {path.name for path in FOLDER.glob("test_*.py")} == {suite for half in HALVES for suite in half}
