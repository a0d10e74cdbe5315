"""`megalite bench`: one layout, measured: tokens a second, FLOP/s, memory, and where the time goes.

In: a run config; batches are random ids, so no shards are needed and none are read.  Out: a `result`, plain numbers and words as JSON
holds them. Step times are those of the slowest rank, after a warm-up; shares come from two more steps under torch's profiler, which slows
them.

    tokens/s          global batch x sequence / step time; per GPU: over the ranks
    model FLOPs       3 x forward, all s x s scores of attention (models/counts.py); `causal` counts the half that a causal kernel does
    MFU, HFU          model FLOPs, and those with what recomputation repeats, over step time, ranks and the peak of the data sheet
"""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import megalite
from megalite import hardware, launch
from megalite.config import Config
from megalite.ds_config import read_document
from megalite.models import counts
from megalite.tune import hindsight, search
from megalite.tune.parity import batch_of, microbatches, start_engine

LINKS = {  # as NCCL's kernels and gloo's events are called, without the lines under them
    "all-reduce": ("allreduce",),
    "all-gather": ("allgather",),
    "reduce-scatter": ("reducescatter",),
    "all-to-all": ("alltoall",),
    "send, receive and waiting for other stages": ("send", "recv"),
}


def measure(config: Config, *, steps: int, warm_up: int) -> dict[str, Any]:
    """Run it on as many ranks as there are; the result of rank 0."""
    document = read_document(config)
    work = functools.partial(_work, steps=steps, warm_up=warm_up, document=document)
    seen = launch.start(config, work, warm=("megalite.engine", functools.partial(_check, document)))
    return {**seen, "config": config.model_dump(mode="json"), "deepspeed": document, **_surroundings()}


def _check(document: dict[str, Any]) -> None:
    from megalite.parallel import zero

    zero.check(document)


def _work(config: Config, rank: int, *, steps: int, warm_up: int, document: dict[str, Any]) -> dict[str, Any]:
    """On every rank."""
    cuda = torch.cuda.is_available()
    device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    engine = start_engine(config, document, device=device)
    dealt = [microbatches(batch_of(config, step), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank) for step in range(2)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(warm_up + steps):
        dist.barrier()
        began = time.perf_counter()
        engine.step(step, dealt[step % 2])
        if cuda:
            torch.cuda.synchronize()  # for the update
        seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(seconds[warm_up:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    held = torch.tensor(float(torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss), device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    shares = _shares(engine, dealt, first=warm_up + steps)
    name = torch.cuda.get_device_name() if cuda else _cpu()
    found = summarise(config, slowest.tolist(), world=dist.get_world_size(), device=name, memory=int(held.item()), shares=shares)
    return {**found, "predicted": predicted(config, document, device=name, gpus=torch.cuda.device_count())}


def predicted(config: Config, document: dict[str, Any], *, device: str, gpus: int) -> dict[str, Any] | None:
    """What `tune` says of this run on such GPUs, `gpus` a node; None where it cannot say, as on a CPU."""
    known = hindsight.foretell(config, document, device=device, gpus=gpus)
    if known is None:
        return None
    low, high = search.interval(known.seconds, known.spread)
    return {"seconds": known.seconds, "low": float(low), "high": float(high), "memory_bytes": known.memory, "constants": known.fitted}


def summarise(config: Config, seconds: list[float], *, world: int, device: str, memory: int, shares: dict[str, float]) -> dict[str, Any]:
    """The figures of a run whose steps took so many seconds each."""
    step, train = statistics.median(seconds), config.train
    tokens = train.global_batch * config.sequence
    flops = counts.step_flops(config.model, config.sequence, train.global_batch)
    scores = 3.0 * train.global_batch * 4.0 * config.sequence**2 * config.model.width * config.model.layers
    again = _recomputed(config)
    gpu = hardware.find(device)
    peak = gpu.peak(train.precision) if gpu else None
    rate = flops / step / world
    return {
        "name": config.name,
        "layout": layout(config),
        "device": device,
        "ranks": world,
        "steps": len(seconds),
        "seconds": {"median": step, "min": min(seconds), "max": max(seconds), "deviation": statistics.pstdev(seconds)},
        "tokens_per_second": tokens / step,
        "tokens_per_second_per_gpu": tokens / step / world,
        "tflops_per_gpu": rate / 1e12,
        "tflops_per_gpu_causal": (flops - scores / 2 * (config.model.family == "gpt")) / step / world / 1e12,
        "mfu": rate / peak if peak else None,
        "hfu": rate * again / peak if peak else None,
        "memory_bytes": memory,
        "shares": shares,
    }


def _recomputed(config: Config) -> float:
    """FLOPs with what full recomputation repeats, over those without; selective repeats no product."""
    if config.train.recompute != "full":
        return 1.0
    costs = counts.layer_costs(config.model, config.sequence)
    layers = min(config.model.layers, config.train.recompute_layers or config.model.layers)
    return 1 + layers * costs[1] / (3 * sum(costs))


def layout(config: Config) -> str:
    """A run's layout in few words."""
    mesh, train = config.mesh, config.train
    said = [f"{axis}{degree}" for axis, degree in mesh.degrees.items() if degree > 1 or axis == "dp"]
    said += [Path(config.deepspeed).stem if config.deepspeed else "zero0", f"micro{train.micro_batch}"]
    said += [train.schedule + (f"{config.num_chunks}" if config.num_chunks > 1 else "")] if mesh.pp > 1 else []
    said += [train.recompute] if train.recompute != "none" else []
    return " ".join([*said, *(["sp"] if train.sequence_parallel else []), train.precision])


def _shares(engine: Any, dealt: list[Any], *, first: int) -> dict[str, float]:
    """Shares of the time of two steps on rank 0, by what the device (or the CPU) was busy with; they may overlap on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        for step in range(2):
            engine.step(first + step, dealt[step])
        if cuda:
            torch.cuda.synchronize()
        whole = time.perf_counter() - began
    found = dict.fromkeys([*LINKS, "optimizer"], 0.0)
    for event in seen.key_averages():
        name = event.key.lower()
        micros = event.device_time_total if cuda else event.cpu_time_total
        if name.startswith(("gloo:", "nccl:", "nccldevkernel", "c10d::")) and not (name.startswith("c10d::") and not cuda):
            if kind := _link(name):
                found[kind] += micros / 1e6 / whole
        elif "_fused_adamw" in name or "multi_tensor_apply" in name or name.startswith("optimizer.step"):
            found["optimizer"] += micros / 1e6 / whole
    found = {kind: min(1.0, share) for kind, share in found.items()}
    return {"compute and the rest": max(0.0, 1 - sum(found.values())), **found}


def _link(name: str) -> str | None:
    """Which kind of transfer a kernel or event is."""
    plain = name.lower().replace("_", "")
    return next((kind for kind, patterns in LINKS.items() if any(pattern in plain for pattern in patterns)), None)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _surroundings() -> dict[str, Any]:
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    versions = {
        "megalite": megalite.__version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }
    return {"versions": versions, "commit": commit, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
