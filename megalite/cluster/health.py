"""Is this node fit to train? Asked before training, on every node at once: `python -m megalite.cluster.health node|together ...`.

`node FOLDER RECORDS GPUS` looks at one node: the run folder and its disk, memory, /dev/shm, each GPU's memory, uncorrected errors and a
matrix product beside the exact one.  `together RECORDS` runs as all the ranks that will train: an all-reduce in every node and one across
all, with the sums checked; clocks; the versions and the code of megalite everywhere.  Out: RECORDS/health-NODE.json with what was found,
exit code 1 where something is wrong, 2 where the run folder is not seen, and the nodes that differ noted as bad in the run folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import megalite
from megalite import launch
from megalite.cluster import history
from megalite.crew import RankError

GIB = 1 << 30
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 1 * GIB, 1 * GIB, 64 << 20  # bytes; below them a run cannot save, start, or talk
LEAST_GPU_MEMORY = 0.9  # share of a GPU that nobody else may hold
SKEW = 2.0  # seconds that clocks may differ
SIZE = 2048  # rows of the matrix product, on a GPU
PATIENCE = 45.0  # seconds for which ranks wait for each other


def check_node(folder: Path, *, gpus: int) -> list[str]:
    """What is wrong with this node; `gpus` is how many it should have."""
    faults = []
    for path, least, what in ((folder, LEAST_DISK, "of disk"), (Path("/dev/shm"), LEAST_SHARED, "of shared memory")):
        if (free := shutil.disk_usage(path).free) < least:
            faults.append(f"{path} has {free / GIB:.2f} GiB {what} free, {least / GIB:.2f} are needed")
    if (free := psutil.virtual_memory().available) < LEAST_MEMORY:
        faults.append(f"{free / GIB:.2f} GiB of memory are free, {LEAST_MEMORY / GIB:.2f} are needed")
    if torch.cuda.device_count() < gpus:
        faults.append(f"{torch.cuda.device_count()} GPUs answer, {gpus} should")
    for number in range(torch.cuda.device_count()):
        faults += [f"GPU {number}: {fault}" for fault in check_gpu(number)]
    if not torch.cuda.device_count() and not _multiplies_rightly(torch.device("cpu"), torch.float32, size=256):
        faults.append("a matrix product is wrong")
    return faults


def check_gpu(number: int) -> list[str]:
    """What is wrong with one GPU."""
    faults = []
    try:
        device = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(device)
        if free < LEAST_GPU_MEMORY * total:
            faults.append(f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free: another process is on it")
        if not _multiplies_rightly(device, torch.bfloat16, size=SIZE):
            faults.append("a matrix product is wrong")
    except RuntimeError as error:
        faults.append(str(error).splitlines()[0])
    query = ["nvidia-smi", f"--id={number}", "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        errors = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return [*faults, f"nvidia-smi does not answer ({type(error).__name__})"]
    return [*faults, f"{errors} uncorrected memory errors"] if errors.isdigit() and int(errors) else faults


def _multiplies_rightly(device: torch.device, dtype: torch.dtype, *, size: int) -> bool:
    """Whole numbers small enough for every product and sum to be exact in fp32, so any difference is a fault of the machine."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, (size, size), generator=draw).to(device, dtype) for _ in range(2))
    ones = torch.ones(size, 1, device=device, dtype=torch.float64)
    exact = left.double() @ (right.double() @ ones)
    product = torch.mm(left, right, out_dtype=torch.float32) if device.type == "cuda" else left @ right
    return bool(torch.equal(product.double() @ ones, exact))


def check_together(rank: int) -> list[tuple[str, str]]:
    """(node, fault) pairs, the same on every rank: what differs between nodes, or goes wrong between them."""
    node, device = launch.node_name(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(known, {"node": node, **versions()})
    faults = differences(known)
    neighbours = [number for number, other in enumerate(known) if other["node"] == node]
    inside = None
    for name in dict.fromkeys(other["node"] for other in known):  # every rank makes every group
        group = dist.new_group([number for number, other in enumerate(known) if other["node"] == name])
        inside = group if name == node else inside
    wrong = []
    for group, ranks in ((inside, neighbours), (None, range(len(known)))):
        value = torch.full((1 << 20,), float(rank + 1), device=device)
        dist.all_reduce(value, group=group)
        if not bool((value == sum(number + 1 for number in ranks)).all()):
            wrong.append((node, "an all-reduce gave a wrong sum " + ("in the node" if group else "across the nodes")))
    dist.barrier()
    mine: list[Any] = [None] * len(known)
    dist.all_gather_object(mine, {"wrong": wrong, "clock": time.time()})
    clocks = {other["node"]: told["clock"] for other, told in zip(known, mine, strict=True)}
    middle = sorted(clocks.values())[len(clocks) // 2]
    for name, clock in clocks.items():
        if abs(clock - middle) > SKEW:
            faults.append((name, f"its clock is {clock - middle:+.1f} s off"))
    return faults + sorted({fault for told in mine for fault in told["wrong"]})


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    own = Path(megalite.__file__).parent
    code = hashlib.sha256()
    for path in sorted(own.rglob("*.py")):
        code.update(f"{path.relative_to(own)}\0".encode() + path.read_bytes())
    libraries = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"python": platform.python_version(), **libraries, "megalite's code": code.hexdigest()[:12]}


def differences(known: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Nodes that have something else than most have; where there is no majority, than the first has."""
    faults = []
    for name in known[0]:
        if name == "node":
            continue
        counts = Counter(told[name] for told in known)
        usual, most = counts.most_common(1)[0]
        usual = known[0][name] if counts[known[0][name]] == most else usual
        for node, own in dict.fromkeys((told["node"], told[name]) for told in known):
            if own != usual:
                faults.append((node, f"{name} is {own}, elsewhere {usual}"))
    return faults


def main(words: list[str]) -> int:
    if words[0] == "node":
        folder, records, gpus = Path(words[1]), Path(words[2]), int(words[3])
        node = launch.node_name()
        if not records.is_dir():
            _tell(f"{node} does not see {records}: run.folder must be on a disk that all nodes share")
            return 2
        began = time.monotonic()
        faults = check_node(folder, gpus=gpus)
        (records / f"health-{node}.json").write_text(json.dumps({"faults": faults, "seconds": time.monotonic() - began, **versions()}))
        for fault in faults:
            _tell(f"{node}: {fault}")
        return bool(faults)
    return _together(Path(words[1]))


def _together(records: Path) -> int:
    try:
        faults = launch.join(check_together, patience=PATIENCE)
    except RankError as error:
        if launch.is_rank_zero():
            _note(records, error.report, culprit=error.rank)
        raise
    if launch.is_rank_zero():
        for node, fault in faults:
            history.append(records.parents[1], history.BAD_NODES, node=node, reason=fault, job=records.name.split("-")[0])
            _tell(f"{node} is bad: {fault}")
        if faults:
            _note(records, "; ".join(f"{node}: {fault}" for node, fault in faults), culprit=None)
    return bool(faults)


def _note(records: Path, report: str, *, culprit: int | None) -> None:
    note = {"rank": 0, "node": launch.node_name(), "time": time.time(), "kind": "health", "culprit": culprit, "report": report}
    (records / "rank-0.json").write_text(json.dumps(note))


def _tell(line: str) -> None:
    sys.stderr.write(f"health: {line}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
