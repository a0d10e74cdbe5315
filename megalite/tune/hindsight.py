"""Predicted beside measured, after a run: was the prediction good, and is the run as it should be?

In: a run's config and what its metrics say, on a known GPU.  Out: lines for the console; a warning where the truth lies outside the
interval. On a CPU and on a GPU that clusters.yaml does not know there is no prediction and nothing is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite import config as settings
from megalite import hardware, launch
from megalite.config import Config, run_folder
from megalite.ds_config import read_document
from megalite.hardware import GIB
from megalite.tune import cluster, memory, runtime, search, speed
from megalite.tune.layouts import OFFLOAD, RECOMPUTE, REDUCE, SCHEDULES, Layouts
from megalite.tune.shape import Shape
from megalite.tune.splits import split

DEFAULT_BUCKET, DEFAULT_LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's own


def layout_of(config: Config, document: dict[str, Any]) -> Layouts:
    """The layout of a run, one row; mesh.dp must be known."""
    train, zero = config.train, document.get("zero_optimization", {})
    offload = [key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device", "none") != "none"]
    return Layouts.of(
        **config.mesh.degrees,
        schedule=SCHEDULES.index(train.schedule),
        chunks=config.num_chunks,
        micro=train.micro_batch,
        stage=zero.get("stage", 0),
        reduce=REDUCE.index(train.reduce or "microbatch"),
        offload=OFFLOAD.index("parameters") if "offload_param" in offload else len(offload),
        recompute=RECOMPUTE.index(train.recompute),
        split_sequence=train.sequence_parallel,
        bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
        live=int(zero.get("stage3_max_live_parameters", DEFAULT_LIVE)),
        batch=train.global_batch,
    )


def kind_of(device: str) -> str | None:
    """The first kind of clusters.yaml that has the GPU a driver calls so."""
    gpu = hardware.find(device)
    return next((name for name, kind in cluster.table().items() if gpu and kind["gpu"] == gpu.name), None)


@dataclass(frozen=True)
class Foretold:
    """Of a run on known GPUs, with the spreads of both (of their logarithms)."""

    seconds: float  # a step
    memory: float  # bytes of tensors on the fullest GPU; CUDA's context is beside them
    spread: float
    memory_spread: float
    fitted: str  # what the constants were fitted to


def foretell(config: Config, document: dict[str, Any], *, device: str, gpus: int) -> Foretold | None:
    """`gpus` are those of a node. None where nothing can be predicted: on a CPU, on a GPU that clusters.yaml does not know, for settings
    that the closed form does not know."""
    kind = kind_of(device)
    if kind is None or config.train.recompute_layers is not None:
        return None
    gpus = min(gpus, config.mesh.world)
    machines = cluster.find(f"{max(1, config.mesh.world // gpus)}x{gpus}x{kind}")
    if machines.gpu.peak(config.train.precision) is None:
        return None
    layout, shape = layout_of(config, document), Shape.of(config)
    ours = search.for_precision(runtime.find("megalite", kind=kind), config)
    ranks = split(shape, layout, ours.rule)
    seconds = float(speed.total(speed.step_time(shape, layout, ranks, cluster=machines, runtime=ours), layout, machines, ours)[0])
    held = float(memory.peak(memory.waterfall(shape, layout, ranks, ours))[0]) - ours.memory.context
    return Foretold(seconds, held, ours.spread, ours.memory_spread, ours.fitted)


def beside(config: Config, document: dict[str, Any], measured: dict[str, Any], *, device: str, gpus: int) -> list[str]:
    """`measured` is a line of metrics.jsonl. Empty where nothing can be predicted."""
    found = foretell(config, document, device=device, gpus=gpus)
    if found is None:
        return []
    return [
        _line("step time", measured["seconds"], found.seconds, found.spread, "s"),
        _line("memory", measured["memory_bytes"] / GIB, found.memory / GIB, found.memory_spread, "GiB"),
        f"             by constants of: {found.fitted}",
    ]


def _line(what: str, truth: float, predicted: float, spread: float, unit: str) -> str:
    low, high = search.interval(predicted, spread)
    inside = low <= truth <= high
    mark = "" if inside else f"; WARNING: outside, {np.abs(truth / predicted - 1):.0%} {'above' if truth > predicted else 'below'} it"
    return f"{what:12s} {truth:.3f} {unit}, predicted {predicted:.3f}, 80 % between {low:.3f} and {high:.3f}{mark}"


def look_back(config: Config) -> list[str]:
    """Of a run of this machine's GPUs that has ended; nothing without a GPU, and on ranks that do not speak for the run."""
    if not torch.cuda.is_available() or not launch.is_rank_zero():
        return []
    return read_back(config, device=torch.cuda.get_device_name(), gpus=torch.cuda.device_count())


def read_back(config: Config, *, device: str, gpus: int) -> list[str]:
    """From the run's folder: its resolved config and its last metrics."""
    folder = run_folder(config)
    resolved = settings.load(str(folder / "config.yaml"))
    measured = _last(folder / "metrics.jsonl")
    return beside(resolved, read_document(resolved), measured, device=device, gpus=gpus) if measured else []


def _last(path: Path) -> dict[str, Any] | None:
    """The last line that has a step's time; the first ones of a run warm up."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    timed = [line for line in lines if "seconds" in line and line["step"] > 1]
    return timed[-1] if timed else None
