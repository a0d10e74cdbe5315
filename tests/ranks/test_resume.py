"""A run that was killed and resumed is, bit for bit, the run that was never stopped; and looking at a run does not change it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from megalite.checkpoint import store
from megalite.data.shards import Writer

STEPS = 8


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random tokens: enough windows for more than an epoch's worth of different batches."""
    prefix = str(tmp_path_factory.mktemp("data") / "random")
    draw = np.random.default_rng(0)
    for split, size in (("train", 20_000), ("valid", 2_000)):
        with Writer(f"{prefix}.{split}", vocab_size=64) as writer:
            writer.add(draw.integers(0, 64, size).astype(np.uint16))
    return prefix


def _run_file(folder: Path, shard: str, **changes: object) -> Path:
    document = {
        "name": "small",
        "model": {"layers": 2, "width": 32, "heads": 2, "vocab": 64, "sequence": 16},
        "mesh": {"dp": 2, "pp": 2},
        "data": {"train": [shard]},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
        "optimizer": {"warmup": 2, "lr": 1e-2},
        "deepspeed": "zero3",
        "log": {"every": 1, "tensorboard": False},
        "validation": {"every": 3, "batches": 1},
        "checkpoint": {"every": 2, "keep": 10},
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _train(run_file: Path, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megalite", "train", str(run_file), "--run.folder", str(folder), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def _finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def _losses(folder: Path) -> dict[int, tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == len({line["step"] for line in trained}), "a step stands in metrics.jsonl twice"
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in trained}


def _tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    known = store.index(checkpoint).state_dict_metadata
    state = {name: torch.zeros(entry.size) for name, entry in known.items()}
    dcp.load(state, storage_reader=store.Reader(checkpoint), no_dist=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def test_killed_and_resumed_equals_never_stopped_bit_for_bit(shard: str, tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, shard)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(_train(run_file, whole))

    process = _train(run_file, broken)
    deadline = time.monotonic() + 90
    while not (broken / "checkpoints/step-4/manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its second checkpoint"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (broken / "checkpoints/step-8").exists():  # a quick machine: let it take some steps again all the same
        pytest.fail("the run was over before it could be killed; make it longer")
    _finish(_train(run_file, broken))

    assert _losses(broken) == _losses(whole)
    assert sorted(_losses(whole)) == list(range(1, STEPS + 1))
    ours, theirs = _tensors(broken / f"checkpoints/step-{STEPS}"), _tensors(whole / f"checkpoints/step-{STEPS}")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_validating_and_saving_changes_nothing(schedule: str, shard: str, tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, shard)
    document = yaml.safe_load(run_file.read_text())
    document["train"]["schedule"] = schedule
    run_file.write_text(yaml.safe_dump(document))
    _finish(_train(run_file, tmp_path / "often", "--validation.every", "1", "--checkpoint.every", "1"))
    _finish(_train(run_file, tmp_path / "never", "--validation.every", "0", "--checkpoint.every", "0"))
    assert _losses(tmp_path / "often") == _losses(tmp_path / "never")


def test_a_checkpoint_goes_on_on_another_mesh_and_zero_stage(shard: str, tmp_path: Path) -> None:
    """fp32 sums in another order differ in the last bits: 1e-5 of the loss."""
    run_file = _run_file(tmp_path, shard)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    _finish(_train(run_file, whole))
    _finish(_train(run_file, moved, "--train.steps", "8", "--checkpoint.every", "4"))
    shutil.rmtree(moved / "checkpoints/step-8")
    _finish(_train(run_file, moved, "--mesh.dp", "1", "--mesh.pp", "1", "--mesh.tp", "2", "--deepspeed", "zero1"))
    for step, (loss, norm, rate) in _losses(moved).items():
        assert loss == pytest.approx(_losses(whole)[step][0], rel=1e-5)
        assert norm == pytest.approx(_losses(whole)[step][1], rel=1e-4)  # a norm gathers the differences of all weights
        assert rate == _losses(whole)[step][2]


def test_a_finished_run_says_so_and_trains_nothing(shard: str, tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, shard)
    _finish(_train(run_file, tmp_path / "run"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert "nothing left to train" in _finish(_train(run_file, tmp_path / "run"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.layers", "3"), "layers = 2"),
        (("--train.global-batch", "16"), "train.global_batch = 8"),
        (("--run.seed", "5"), "run.seed = 1234"),
        (("--checkpoint.resume", "none"), "checkpoint.resume = none"),
        (("--checkpoint.resume", "/nowhere"), "holds checkpoints of its own"),
        (("--checkpoint.resume", "/nowhere", "--run.folder", "{fresh}"), "/nowhere is no checkpoint"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(
    shard: str, tmp_path_factory: pytest.TempPathFactory, flags: tuple, words: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "refused"
    folder.mkdir(exist_ok=True)
    run_file = _run_file(folder, shard)
    if not (folder / "run/checkpoints").exists():
        _finish(_train(run_file, folder / "run", "--train.steps", "2"))
    process = _train(run_file, folder / "run", *(flag.format(fresh=folder / "fresh") for flag in flags))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert words in output and output.count("\n") == 1, output
