"""Seconds of saving and of loading on another layout, beside DeepSpeed's save, ds_to_universal and load; same model, same ranks, one run.

    python tests/bench_checkpoint.py [--width 768 --layers 12 --vocab 16384] [--runs 3]

Two CPU ranks under ZeRO-3 save; the same two load. What we write is synced to the disk, what DeepSpeed writes is not. Ours is written once
waiting for the disk and once in the background, whose stall is the copy alone. On shared cores only ratios from one run mean something.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite import launch
from megalite.checkpoint import manifest, storage
from megalite.checkpoint.store import Store
from megalite.config import Checkpoint, Config
from megalite.tune import parity

RANKS = 2


def config_of(settings: argparse.Namespace, *, tp: int = 1) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": settings.layers, "width": settings.width, "heads": 12, "vocab": settings.vocab, "sequence": 64},
            "mesh": {"dp": RANKS // tp, "tp": tp},
            "train": {"global_batch": RANKS, "micro_batch": 1, "precision": "fp32"},
        }
    )


def document() -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3}}


def engine_of(config: Config) -> Any:
    """An engine whose moments are not 0."""
    engine = parity.start_engine(config, document())
    mine = parity.microbatches(parity.batch_of(config, 0), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
    engine.step(0, mine)
    return engine


def clock(work: Callable[[], Any]) -> float:
    """Seconds from when all ranks are there until all are done."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def save_ours(rank: int, settings: argparse.Namespace, folder: Path) -> dict[str, float]:
    config = config_of(settings)
    engine, facts = engine_of(config), {"config": config.model_dump(mode="json")}
    found: dict[str, float] = {}
    waiting = Store(folder / "waiting", Checkpoint(background=False), tied={})
    found["save, waiting"] = clock(lambda: waiting.save(1, engine.zero.pieces(), facts))
    with Store(folder / "background", Checkpoint(keep=9), tied={}) as store:
        store.make_room(engine.zero.pieces())
        store.settle()
        found["first stall"] = clock(lambda: store.save(1, engine.zero.pieces(), facts))
        found["save, in the background"] = clock(store.settle)
        found["stall"] = clock(lambda: store.save(2, engine.zero.pieces(), facts))
        store.settle()
    spent, plain = 0.0, manifest.checksum

    def timed(data: Any) -> str:
        nonlocal spent
        began = time.perf_counter()
        total = plain(data)
        spent += time.perf_counter() - began
        return total

    storage.checksum = timed
    again = Store(folder / "again", Checkpoint(background=False), tied={})
    whole = clock(lambda: again.save(1, engine.zero.pieces(), facts))
    found["checksums, share of saving"] = 2 * spent / whole  # each byte is summed twice: in its chunk and in its file
    return found


def load_ours(rank: int, settings: argparse.Namespace, folder: Path) -> dict[str, float]:
    engine = engine_of(config_of(settings, tp=RANKS))

    def load() -> None:
        Store(folder / "waiting", Checkpoint(), tied={}).load(folder / "waiting/step-1", engine.zero.pieces())
        engine.restore(1, {})

    return {"load on tp 2": clock(load)}


def save_theirs(rank: int, settings: argparse.Namespace, folder: Path) -> dict[str, float]:
    engine = engine_of(config_of(settings)).zero.engine
    with contextlib.redirect_stdout(None):
        return {"DeepSpeed save": clock(lambda: engine.save_checkpoint(str(folder / "theirs"), tag="one"))}


def load_theirs(rank: int, settings: argparse.Namespace, folder: Path) -> dict[str, float]:
    config = config_of(settings)
    engine = parity.start_engine(config, {**document(), "checkpoint": {"load_universal": True}}).zero.engine

    def load() -> None:
        loaded, _ = engine.load_checkpoint(str(folder / "theirs"), tag="universal")
        assert loaded is not None

    with contextlib.redirect_stdout(None):
        return {"DeepSpeed universal load": clock(load)}


def convert(folder: Path) -> float:
    """DeepSpeed's own program, as its documentation says to call it, on as many workers as there are ranks."""
    source, target = folder / "theirs/one", folder / "theirs/universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source), "--output_folder", str(target)]
    workers = ["--num_extract_workers", str(RANKS), "--num_merge_workers", str(RANKS)]
    began = time.perf_counter()
    subprocess.run([*command, *workers], check=True, capture_output=True)
    return time.perf_counter() - began


def measure(settings: argparse.Namespace) -> dict[str, float]:
    """One round: ours, then theirs."""
    folder = Path(tempfile.mkdtemp(prefix="megalite-bench-"))
    try:
        found: dict[str, float] = {}
        for work in (save_ours, load_ours, save_theirs):
            answers = launch.run_ranks(RANKS, lambda rank, work=work: work(rank, settings, folder), warm=("megalite.engine",))
            found |= {name: max(answer[name] for answer in answers) for name in answers[0]}
        found["bytes"] = sum(path.stat().st_size for path in (folder / "waiting/step-1").iterdir())
        found["ds_to_universal"] = convert(folder)
        found |= launch.run_ranks(RANKS, lambda rank: load_theirs(rank, settings, folder), warm=("megalite.engine",))[0]
        return found
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 768), ("layers", 12), ("vocab", 16384), ("runs", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = parser.parse_args()
    rounds = [measure(settings) for _ in range(settings.runs)]
    found = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ours = found["save, waiting"] + found["load on tp 2"]
    theirs = found["DeepSpeed save"] + found["ds_to_universal"] + found["DeepSpeed universal load"]
    print(f"{found.pop('bytes') / 1e6:,.0f} MB on {RANKS} ranks, torch {torch.__version__}, median of {settings.runs}")
    for name, value in found.items():
        print(f"{name:<32}{value:9.1%}" if "share" in name else f"{name:<32}{value:9.3f} s")
    print(f"{'ours: save and load':<32}{ours:9.3f} s, {ours / theirs:.2f} of DeepSpeed's {theirs:.3f} s")
    print(f"{'stall of the training':<32}{found['stall'] / found['save, waiting']:9.3f} of a save that waits")


if __name__ == "__main__":
    main()
