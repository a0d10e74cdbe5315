"""Bad input, end to end: exit code 2, one line that names the value, the limit and the cure, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from forked import Forked
from rich.console import Console

from megalite.data.prepare import Preparation, prepare
from megalite.data.shards import Writer


def _megalite(folder: Path, *arguments: str) -> Forked:
    return Forked([*arguments], cwd=folder)


def _refusal(folder: Path, *arguments: str) -> str:
    """The one line that a refused command says."""
    process = _megalite(folder, *arguments)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 2, said
    assert said.startswith("megalite: ") and said.count("\n") == 1, said
    left = {path.name for path in folder.glob("runs/*/*")}
    assert left <= {".lock", "config.yaml", "control", "logs", "metrics.jsonl"}, (
        "a refused run left something that a later one could take for whole"
    )
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file and shards that are good, until a test spoils them."""
    with Writer(tmp_path / "tokens.train", vocab_size=64) as writer:
        writer.add(np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint16))
    document = {
        "model": {"layers": 2, "width": 32, "heads": 4, "vocab": 64, "sequence": 16},
        "mesh": {"dp": 2},
        "data": {"train": ["tokens"]},
        "train": {"steps": 4000, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
        "log": {"every": 1, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mesh.tp", "3"], ["model.heads = 4", "mesh.tp = 3"]),
        (["--mesh.pp", "5"], ["mesh.pp = 5", "2 blocks"]),
        (["--mesh.ranks", "3"], ["dp*pp*tp = 2*1*1 = 2", "3 ranks"]),
        (["--train.global-batch", "6"], ["train.global_batch = 6", "multiple of 4"]),
        (["--data.train", "nowhere"], ["nowhere.train.bin does not exist", "megalite prepare INPUT... --output nowhere --tokenizer"]),
        (["--data.sequence", "64"], ["data.sequence = 64", "model.sequence = 16"]),
        (["--deepspeed", "zero9"], ["zero9", "zero3.json"]),
        (["--train.stpes", "3"], ["--train.stpes", "--train.steps"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_a_rank_starts(folder: Path, flags: list[str], words: list[str]) -> None:
    said = _refusal(folder, "train", "run.yaml", *flags)
    for word in words:
        assert word in said
    assert not (folder / "runs").exists(), "a run folder for a run that never was"


def test_tokens_beyond_the_vocabulary_are_refused_when_they_are_met(folder: Path) -> None:
    """Shards of Megatron name no tokenizer, so nobody knows their largest id before it is read."""
    assert "32" in _refusal(folder, "train", "run.yaml", "--model.vocab", "32")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size = 8", "train.global_batch = 8"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "train.clip = 1.0"]),
        ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation", "did you mean zero_optimization"]),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}, ["stage3_prefetch_bucket", "stage3_prefetch_bucket_size"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, ["zero_hpz_partition_size = 3", "mesh.dp x mesh.cp"]),
    ],
)
def test_a_deepspeed_json_that_contradicts_the_run_is_refused(folder: Path, document: dict, words: list[str]) -> None:
    (folder / "ds.json").write_text(json.dumps(document))
    said = _refusal(folder, "train", "run.yaml", "--deepspeed", "ds.json")
    for word in words:
        assert word in said


def test_a_truncated_shard_is_refused_with_its_sizes(folder: Path) -> None:
    shard = folder / "tokens.train.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    said = _refusal(folder, "train", "run.yaml")
    assert "tokens.train.bin" in said and "7900" in said.replace(",", "") and "8000" in said.replace(",", "")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text under two tokenizers: one/ and two/."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("\n".join(f"line {number} says {number * number}" for number in range(400)))
    for name, size in (("one", 300), ("two", 310)):
        prepare(
            Preparation(
                inputs=(str(folder / "text.txt"),),
                output=str(folder / name),
                tokenizer="train:bpe",
                vocab_size=size,
                documents="line",
                workers=1,
                splits=(1.0, 0.0, 0.0),
            ),
            console=Console(quiet=True),
        )
    return folder


@pytest.mark.parametrize(
    "wrong", [["--data.train", "{}/one", "{}/two"], ["--data.train", "{}/one", "--data.tokenizer", "{}/two.tokenizer"]]
)
def test_a_tokenizer_that_does_not_match_the_shards_is_refused(folder: Path, prepared: Path, wrong: list[str]) -> None:
    said = _refusal(folder, "train", "run.yaml", "--model.vocab", "512", *(word.format(prepared) for word in wrong))
    one, two = (json.loads((prepared / f"{name}.manifest.json").read_text())["tokenizer"][:12] for name in ("one", "two"))
    assert one != two and one in said and two in said, "both fingerprints are named"
    assert "prepare all shards with one tokenizer" in said
    assert not (folder / "runs").exists()


def test_a_run_file_that_is_no_yaml_is_refused(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: [1, 2")
    assert "run.yaml" in _refusal(folder, "train", "run.yaml")


def test_an_empty_corpus_is_refused_and_leaves_no_shard(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    _refusal(tmp_path, "prepare", "empty.jsonl", "--output", "out", "--tokenizer", "train:bpe")
    assert not list(tmp_path.glob("out*.bin")) and not list(tmp_path.glob("out*.idx"))


def test_a_rank_that_is_killed_takes_the_run_down_and_leaves_no_orphan(folder: Path) -> None:
    process = _megalite(folder, "train", "run.yaml", "--deepspeed", "zero3")
    metrics, deadline = folder / "runs/run/metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)
    ranks = process.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - killed < 5
    assert process.returncode == 1 and "rank 1 was ended by SIGKILL" in said
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
