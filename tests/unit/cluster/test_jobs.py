"""What `megalite jobs` says of a job that is gone, by what accounting prints (taken from sacct 22.05.8 and a slurmdbd)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalite.cluster import commands, history, jobs


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("FAILED|3:0", "accounting says FAILED, 3:0"),
        ("CANCELLED by 0|0:0", "accounting says CANCELLED by 0, 0:0"),
        ("", "not in the queue any more; see"),
    ],
)
def test_a_job_that_left_the_queue_is_told_by_accounting(printed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, prints in (("sacct", printed), ("squeue", "")):
        (programs / name).write_text(f"#!/bin/sh\nprintf '{prints}'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    (tmp_path / "run/slurm").mkdir(parents=True)
    history.append(tmp_path / "run", history.JOBS, job="7", name="pretrain", arguments=[])
    assert said in jobs.show([str(tmp_path / "run")])


def test_without_accounting_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert commands.ended("7") is None
