"""Which checkpoint a run starts from, and what must not have changed: decided from files alone, before any rank starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint import manifest, resume, store
from megalite.config import Config
from megalite.errors import UserError


def _config(folder: Path, **sections: Any) -> Config:
    run = {"folder": str(folder), **sections.pop("run", {})}
    return Config.model_validate({"run": run, "model": {"vocab": 64, **sections.pop("model", {})}, **sections})


def _checkpoint(config: Config, step: int, *, folder: Path | None = None, **facts: Any) -> Path:
    """What the store leaves: a folder with a manifest. The tensors are read later, by the ranks."""
    path = (folder or Path(config.run.folder or "")) / f"checkpoints/step-{step}"
    path.mkdir(parents=True)
    manifest.write(path, {"step": step, "config": config.model_dump(mode="json"), **facts}, files={}, chunks={})
    return path


def _refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        resume.find(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_a_fresh_folder_starts_from_nothing(tmp_path: Path, asked: str) -> None:
    assert resume.find(_config(tmp_path, checkpoint={"resume": asked})) == []


def test_auto_takes_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    config = _config(tmp_path)
    found = [_checkpoint(config, step) for step in (9, 100, 20)]
    assert resume.find(config) == [found[1], found[2], found[0]]


@pytest.mark.parametrize("name", ["step-300.partial", "step-300x", "step-", "300", "step-300.partial.old"])
def test_a_folder_that_is_not_called_step_n_is_never_taken_for_whole(tmp_path: Path, name: str) -> None:
    config = _config(tmp_path)
    whole = _checkpoint(config, 2)
    _checkpoint(config, 300).rename(tmp_path / "checkpoints" / name)
    assert resume.find(config) == [whole]
    assert store.whole(tmp_path / "checkpoints") == [whole]


def test_a_folder_without_a_manifest_is_never_taken_for_whole(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (_checkpoint(config, 4) / "manifest.json").unlink()
    assert resume.find(config) == []


def test_none_refuses_a_folder_that_holds_checkpoints(tmp_path: Path) -> None:
    config = _config(tmp_path, checkpoint={"resume": "none"})
    _checkpoint(config, 4)
    said = _refusal(config)
    assert "checkpoints/step-4 exists and checkpoint.resume = none" in said
    assert "choose another run.folder or checkpoint.resume = auto" in said


def test_a_named_checkpoint_of_another_run_starts_a_fresh_folder(tmp_path: Path) -> None:
    path = _checkpoint(_config(tmp_path / "first"), 4)
    assert resume.find(_config(tmp_path / "second", checkpoint={"resume": str(path)})) == [path]


def test_a_named_checkpoint_of_another_run_is_refused_where_the_folder_has_its_own(tmp_path: Path) -> None:
    path = _checkpoint(_config(tmp_path / "first"), 4)
    second = _config(tmp_path / "second", checkpoint={"resume": str(path)})
    _checkpoint(second, 2)
    assert "holds checkpoints of its own and checkpoint.resume" in _refusal(second)


def test_an_older_checkpoint_of_the_own_folder_may_be_named(tmp_path: Path) -> None:
    config = _config(tmp_path)
    older = _checkpoint(config, 2)
    _checkpoint(config, 4)
    assert resume.find(_config(tmp_path, checkpoint={"resume": str(older)})) == [older]


def test_latest_may_be_named(tmp_path: Path) -> None:
    config = _config(tmp_path)
    path = _checkpoint(config, 2)
    (tmp_path / "checkpoints/latest").symlink_to("step-2")
    assert resume.find(_config(tmp_path, checkpoint={"resume": str(tmp_path / "checkpoints/latest")})) == [path]


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    said = _refusal(_config(tmp_path, checkpoint={"resume": str(tmp_path / "nothing")}))
    assert "nothing is no checkpoint: it has no manifest.json; name a step-N folder" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 4}', '{"step": 4, "config": {}, "xxh3_128": "0"}', "\udcff"])
def test_a_manifest_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = _checkpoint(_config(tmp_path), 4)
    (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"checkpoint file {path}/manifest.json " in _refusal(_config(tmp_path))


@pytest.mark.parametrize("facts", [{"step": "four"}, {"config": None}])
def test_a_manifest_that_lacks_something_is_refused_in_one_line(tmp_path: Path, facts: dict[str, Any]) -> None:
    config = _config(tmp_path)
    path = _checkpoint(config, 4)
    whole = {"step": 4, "config": config.model_dump(mode="json"), **facts}
    manifest.write(path, whole, files={}, chunks={})
    assert f"manifest.json has no {next(iter(facts))}; it was not written by megalite" in _refusal(config)


def test_a_damaged_manifest_is_passed_over_for_an_older_checkpoint(tmp_path: Path) -> None:
    config = _config(tmp_path)
    older, newer = _checkpoint(config, 2), _checkpoint(config, 4)
    (newer / "manifest.json").write_text("{")
    assert resume.find(config) == [newer, older]  # the ranks try them in turn, and say what was wrong
    (older / "manifest.json").write_text("{")
    assert "step-4/manifest.json cannot be read" in _refusal(config)


def test_a_checkpoint_of_another_model_is_refused_though_an_older_one_would_fit(tmp_path: Path) -> None:
    _checkpoint(_config(tmp_path), 2)
    _checkpoint(_config(tmp_path, model={"layers": 3}), 4)
    assert "step-4 was written with model layers = 3" in _refusal(_config(tmp_path))


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    config = _config(tmp_path)
    path = _checkpoint(config, 4, tokenizer="a" * 64)
    assert resume.find(config, tokenizer="a" * 64) == [path]
    with pytest.raises(UserError, match=r"written with tokenizer aaaaaaaaaaaa, these shards have bbbbbbbbbbbb; prepare them"):
        resume.find(config, tokenizer="b" * 64)


def test_an_imported_model_goes_on_with_any_data(tmp_path: Path) -> None:
    path = _checkpoint(_config(tmp_path), 0, imported="gpt2")
    assert resume.find(_config(tmp_path, run={"seed": 5}, data={"train": ["other"]})) == [path]
    assert "model layers = 12, this run has layers = 3" in _refusal(_config(tmp_path, model={"layers": 3}))


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
    ({"task": {"kind": "lm", "start": "a", "train": ["b"]}}, "task = None, this run has = kind='lm'"),
    ({"data": {"document_mask": True}}, "data.document_mask = False, this run has = True"),
]


def test_everything_that_is_pinned_is_tried_below() -> None:
    tried = {words.split(" ")[0] for _, words in PINNED}
    assert tried == set(resume.PINNED)


@pytest.mark.parametrize(("change", "words"), PINNED)
def test_what_decides_weights_and_samples_must_not_have_changed(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = _checkpoint(_config(tmp_path), 4)
    said = _refusal(_config(tmp_path, **change))
    assert said.startswith(f"{path} was written with {words}") and said.endswith("; restore it or change run.folder")


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
    assert resume.find(_config(tmp_path, **change)) == [path]
