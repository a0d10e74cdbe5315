"""Which checkpoint a run starts from, and what must not have changed: decided from files alone, before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint import resume, store
from megalite.config import Config
from megalite.errors import UserError


def _config(folder: Path, **sections: Any) -> Config:
    run = {"folder": str(folder), **sections.pop("run", {})}
    return Config.model_validate({"run": run, "model": {"vocab": 64, **sections.pop("model", {})}, **sections})


def _checkpoint(config: Config, step: int, *, folder: Path | None = None) -> Path:
    """What the store leaves: a folder with facts. The tensors are read later, by the ranks."""
    path = (folder or Path(config.run.folder or "")) / f"checkpoints/step-{step}"
    path.mkdir(parents=True)
    (path / "facts.json").write_text(json.dumps({"step": step, "config": config.model_dump(mode="json")}))
    return path


def _refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        resume.find(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_a_fresh_folder_starts_from_nothing(tmp_path: Path, asked: str) -> None:
    assert resume.find(_config(tmp_path, checkpoint={"resume": asked})) is None


def test_auto_takes_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    config = _config(tmp_path)
    found = [_checkpoint(config, step) for step in (9, 100, 20)]
    assert resume.find(config) == found[1]


@pytest.mark.parametrize("name", ["step-300.partial", "step-300x", "step-", "300", "step-300.partial.old"])
def test_a_folder_that_is_not_called_step_n_is_never_taken_for_whole(tmp_path: Path, name: str) -> None:
    config = _config(tmp_path)
    whole = _checkpoint(config, 2)
    _checkpoint(config, 300).rename(tmp_path / "checkpoints" / name)
    assert resume.find(config) == whole
    assert store.whole(tmp_path / "checkpoints") == [whole]


def test_a_folder_without_facts_is_never_taken_for_whole(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (_checkpoint(config, 4) / "facts.json").unlink()
    assert resume.find(config) is None


def test_none_refuses_a_folder_that_holds_checkpoints(tmp_path: Path) -> None:
    config = _config(tmp_path, checkpoint={"resume": "none"})
    _checkpoint(config, 4)
    said = _refusal(config)
    assert "checkpoints/step-4 exists and checkpoint.resume = none" in said
    assert "choose another run.folder or checkpoint.resume = auto" in said


def test_a_named_checkpoint_of_another_run_starts_a_fresh_folder(tmp_path: Path) -> None:
    path = _checkpoint(_config(tmp_path / "first"), 4)
    assert resume.find(_config(tmp_path / "second", checkpoint={"resume": str(path)})) == path


def test_a_named_checkpoint_of_another_run_is_refused_where_the_folder_has_its_own(tmp_path: Path) -> None:
    path = _checkpoint(_config(tmp_path / "first"), 4)
    second = _config(tmp_path / "second", checkpoint={"resume": str(path)})
    _checkpoint(second, 2)
    assert "holds checkpoints of its own and checkpoint.resume" in _refusal(second)


def test_an_older_checkpoint_of_the_own_folder_may_be_named(tmp_path: Path) -> None:
    config = _config(tmp_path)
    older = _checkpoint(config, 2)
    _checkpoint(config, 4)
    assert resume.find(_config(tmp_path, checkpoint={"resume": str(older)})) == older


def test_latest_may_be_named(tmp_path: Path) -> None:
    config = _config(tmp_path)
    path = _checkpoint(config, 2)
    (tmp_path / "checkpoints/latest").symlink_to("step-2")
    assert resume.find(_config(tmp_path, checkpoint={"resume": str(tmp_path / "checkpoints/latest")})) == path


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    said = _refusal(_config(tmp_path, checkpoint={"resume": str(tmp_path / "nothing")}))
    assert "nothing is no checkpoint: it has no readable facts.json" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 4}', '{"step": "four", "config": {}}', '{"config": {}}', "\udcff"])
def test_facts_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = _checkpoint(_config(tmp_path), 4)
    (path / "facts.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"{path} is no checkpoint: it has no readable facts.json; remove it" in _refusal(_config(tmp_path))


PINNED = [
    ({"model": {"layers": 3}}, "model layers = 12, this run has layers = 3"),
    ({"model": {"tied": False, "width": 384}}, "model width = 768, tied = True, this run has width = 384, tied = False"),
    ({"model": {"vocab": 65}}, "model vocab = 64, this run has vocab = 65"),
    ({"run": {"seed": 5}}, "run.seed = 1234, this run has = 5"),
    ({"train": {"global_batch": 128}}, "train.global_batch = 256, this run has = 128"),
    ({"data": {"train": ["other"]}}, "data.train = (), this run has = ('other',)"),
    ({"data": {"sequence": 8}}, "data.sequence = None, this run has = 8"),
    ({"data": {"whole_word": True}}, "data.whole_word = False, this run has = True"),
    ({"data": {"mask_fraction": 0.2}}, "data.mask_fraction = 0.15, this run has = 0.2"),
]


def test_everything_that_is_pinned_is_tried_below() -> None:
    tried = {words.split(" ")[0] for _, words in PINNED}
    assert tried == set(resume.PINNED)


@pytest.mark.parametrize(("change", "words"), PINNED)
def test_what_decides_weights_and_samples_must_not_have_changed(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = _checkpoint(_config(tmp_path), 4)
    said = _refusal(_config(tmp_path, **change))
    assert said.startswith(f"{path} was written with {words}; restore it or change run.folder")


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": {"dp": 2, "pp": 2, "tp": 2}},
        {"train": {"steps": 5000, "micro_batch": 4, "schedule": "gpipe", "precision": "fp32"}},
        {"optimizer": {"lr": 1e-5}},
        {"deepspeed": "zero1"},
        {"log": {"every": 1}},
        {"checkpoint": {"every": 7}},
    ],
)
def test_mesh_schedule_precision_and_learning_rate_may_change(tmp_path: Path, change: dict[str, Any]) -> None:
    path = _checkpoint(_config(tmp_path), 4)
    assert resume.find(_config(tmp_path, **change)) == path
