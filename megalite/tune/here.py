"""`--cluster here` and `--cluster 8xhere`: this machine, its GPUs by their names, or so many ranks on its CPU by what they can do.

Out: a `Cluster` of one node. On a CPU a rank is the `num`-th part of the machine; products, memory and an all-reduce are timed, which
takes some seconds. The time constants come from GPUs: of a CPU they say which layout is faster at best, and how fast only after trials.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil
import torch

from megalite import hardware, launch
from megalite.errors import UserError
from megalite.hardware import GIB, Gpu
from megalite.tune import network
from megalite.tune.cluster import HERE, Cluster, build, table

SIDE, COPIED, SENT = 1024, 1 << 27, 1 << 22  # of a product's matrices; bytes


def look(num: int | None) -> Cluster:
    """This machine with `num` GPUs, or ranks on its CPU; None: all, a rank a core. Raises UserError for GPUs that no table knows."""
    if not torch.cuda.is_available():
        return _look_at_cpu(num or os.cpu_count() or 1)
    there, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    if num and num > there:
        raise UserError(f"--cluster {num}xhere, but this machine has {there} GPUs; ask for fewer")
    gpu = hardware.find(name)
    kind = next((kind for kind, said in table().items() if gpu and said["gpu"] == gpu.name), None)
    if kind is None:
        raise UserError(f"--cluster here: no table knows {name}; describe it in a .yaml file with the keys of clusters.yaml")
    usable = torch.cuda.get_device_properties(0).total_memory / GIB
    said = {**table()[kind], "name": "here", "kind": kind, "nodes": 1, "gpus": num or there, "usable_gib": usable}
    return build(said, source="--cluster here")


def why_not_here(cluster: Cluster) -> str | None:
    """Why trials for that cluster cannot run on this machine; None where they can."""
    if HERE.fullmatch(cluster.name):
        return None
    there = torch.cuda.device_count()
    gpu = hardware.find(torch.cuda.get_device_name()) if there else None
    if cluster.nodes == 1 and gpu == cluster.gpu and there >= cluster.gpus:
        return None
    found = f"{there} {gpu.name if gpu else 'unknown GPUs'}" if there else "no GPU"
    return f"{cluster.name} is {cluster.world} {cluster.gpu.name} on {cluster.nodes} nodes, and this machine has {found}"


def _look_at_cpu(ranks: int) -> Cluster:
    memory = psutil.virtual_memory().total
    precisions = (("fp32", torch.float32), ("bf16", torch.bfloat16))
    peaks = {name: _products(dtype) / ranks for name, dtype in precisions}
    copied = _copies()
    link = _all_reduce(ranks) if ranks > 1 else copied
    gpu = Gpu("CPU ranks", "", int(memory / ranks), copied / ranks, peaks)
    return Cluster(
        name=f"{ranks}xhere", kind="", nodes=1, gpus=ranks, gpu=gpu, usable=memory / ranks, inside=link, node_link=link,
        host_memory=float(memory), host_link=copied / ranks, host_bandwidth=copied, reach=1.0,
    )  # fmt: skip


def _products(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on all cores."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / _fastest(lambda: a @ a)


def _copies() -> float:
    """Bytes a second that a copy reads and writes."""
    a, b = torch.ones(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    return 2 * COPIED / _fastest(lambda: b.copy_(a))


def _all_reduce(ranks: int) -> float:
    """Bus bandwidth over forked ranks."""
    timed = launch.run_ranks(ranks, lambda rank: network.time_links(rank, sizes=(SENT,), kinds=("all-reduce",)))[0]
    ((moved, seconds),) = timed["seconds"]["all-reduce"].items()
    return moved / seconds


def _fastest(work: Callable[[], object]) -> float:
    took = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)
