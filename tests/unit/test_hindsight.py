"""Predicted beside measured: the layout is read back from a run, and a run that is off is warned of."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from megalite import config as settings
from megalite.config import Config
from megalite.tune import choices, cluster, hindsight, runtime, search
from megalite.tune.layouts import enumerate_layouts

H100 = "NVIDIA H100 80GB HBM3"


def _run(words: str) -> tuple[Config, dict[str, object]]:
    config = settings.load("gpt-1.3b")
    row = choices.read(words, batch=512, world=8).row(0)
    return choices.as_config(config, row), choices.document(row, config)


def test_the_layout_of_a_run_is_the_one_it_was_made_from() -> None:
    config = settings.load("gpt-1.3b")
    found = enumerate_layouts(config, 8)
    for number in random.Random(5).sample(range(len(found)), 200):
        row = found.row(number)
        back = hindsight.layout_of(choices.as_config(config, row), choices.document(row, config)).row(0)
        idle = [key for key, least in (("live", 3), ("bucket", 2)) if row["stage"] < least]
        kept = {**row, **{key: back[key] for key in idle}}
        assert back == kept


def test_a_run_as_predicted_is_not_warned_of_and_one_that_is_off_is() -> None:
    config, document = _run("dp8 zero2 micro4")
    machines, ours = cluster.find("1x8xh100"), runtime.find("megalite", kind="h100")
    layout = hindsight.layout_of(config, document)
    judged = search.judge(config, layout, machines, ours)
    truth = {"seconds": float(judged.seconds[0]), "memory_bytes": float(judged.held[0]) - ours.memory.context, "step": 9}
    good = hindsight.beside(config, document, truth, device=H100, gpus=8)
    assert len(good) == 3 and not any("WARNING" in line for line in good)
    slow = hindsight.beside(config, document, {**truth, "seconds": 3 * truth["seconds"]}, device=H100, gpus=8)
    assert "WARNING: outside, 200% above it" in slow[0] and "WARNING" not in slow[1]
    fat = hindsight.beside(config, document, {**truth, "memory_bytes": 0.8 * truth["memory_bytes"]}, device=H100, gpus=8)
    assert "20% below it" in fat[1]


def test_nothing_is_said_of_a_cpu() -> None:
    config, document = _run("dp8 zero2 micro4")
    assert hindsight.beside(config, document, {"seconds": 1.0, "memory_bytes": 1}, device="AMD EPYC", gpus=8) == []


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_ended_is_read_from_its_folder(tmp_path: Path, steps: int) -> None:
    config, _ = _run("dp8 zero0 micro4")
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(tmp_path)}), "deepspeed": "zero2"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    lines = [{"step": step, "seconds": 10.0, "memory_bytes": 1e9} for step in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "valid_loss": 1.0}]))
    said = hindsight.read_back(config, device=H100, gpus=8)
    assert bool(said) == (steps > 1)
