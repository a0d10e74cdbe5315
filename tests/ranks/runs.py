"""A run of a small model on random tokens, started as a person starts it: for tests of resuming and of faults."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from forked import Forked

from megalite.checkpoint import store
from megalite.data.shards import Writer

STEPS = 8


def make_shard(folder: Path) -> str:
    """Random tokens: enough windows for more than an epoch's worth of different batches."""
    prefix = str(folder / "random")
    draw = np.random.default_rng(0)
    for split, size in (("train", 20_000), ("valid", 2_000)):
        with Writer(f"{prefix}.{split}", vocab_size=64) as writer:
            writer.add(draw.integers(0, 64, size).astype(np.uint16))
    return prefix


def run_file(folder: Path, shard: str, **changes: object) -> Path:
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


def train(path: Path, folder: Path, *flags: str, before: str | None = None) -> Forked:
    """`before` is code that runs in the same interpreter first, to plant a fault."""
    return Forked(["train", str(path), "--run.folder", str(folder), *flags], before=before)


def finish(process: Forked, *, code: int = 0) -> str:
    output, said = process.communicate()
    assert process.returncode == code, output + said
    return output + said


def wait_for(process: Forked, happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended too early" if process.poll() is not None else "never"
        time.sleep(0.01)


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == len({line["step"] for line in trained}), "a step stands in metrics.jsonl twice"
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in trained}


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    known = store.index(checkpoint).state_dict_metadata
    state = {name: torch.zeros(entry.size) for name, entry in known.items()}  # type: ignore[union-attr]
    dcp.load(state, storage_reader=store.Reader(checkpoint), no_dist=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def same_bits(ours: Path, theirs: Path) -> None:
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name
