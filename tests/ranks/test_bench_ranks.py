"""`megalite bench` on CPU ranks: a sweep goes on past a run that fails, and is not measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalite.cli import main


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0), capsys.readouterr().out


def test_a_sweep_measures_what_runs_and_keeps_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "{model.vocab: 64, mesh.pp: 1, mesh.tp: 1, train.global_batch: 4, train.micro_batch: 2, deepspeed: zero2}"
    Path("sweep.yaml").write_text(f"run: gpt-tiny\nflags: {flags}\ngrid: {{mesh.dp: [2, 3]}}\ntimeout: 200\n")
    command = ["bench", "--sweep", "sweep.yaml", "--steps", "2", "--warm-up", "1", "--output", "found"]
    code, said = _run(command, capsys)
    assert code == 0
    good, bad = json.loads(Path("found/results.json").read_text())
    assert good["ranks"] == 2 and good["steps"] == 2 and good["seconds"]["min"] > 0
    assert 0.99 < sum(good["shares"].values()) < 1.6 and good["shares"]["all-reduce"] > 0
    assert good["commit"] is not None and good["versions"]["deepspeed"] and good["config"]["model"]["vocab"] == 64
    assert bad["status"] == "refused" and "not divisible by mesh.dp" in bad["reason"]
    code, said = _run(command, capsys)
    assert said.count("measured before") == 2


@pytest.mark.long
def test_links_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _run(["bench", "network", "--ranks", "2", "--output", str(tmp_path)], capsys)
    found = json.loads((tmp_path / "network.json").read_text())
    assert code == 0 and found["ranks"] == 2
    assert all(line["beta"] > 1e6 for line in found["lines"].values())
    assert "us a call" in said
