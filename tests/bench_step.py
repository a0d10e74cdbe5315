"""Step time of one GPT on CPU ranks: our ZeRO-3 on a mesh, beside plain DeepSpeed ZeRO-3 and beside no ZeRO at all.

    python tests/bench_step.py [--ranks 8] [--steps 8] [--rounds 3] [--layers 4] [--width 128]

Every variant trains the same model on the same global batch; they take turns, round by round. What is said is the median over all steps
but the first two of a round, and its ratio to the first variant's: CPU ranks share cores, so seconds mean nothing elsewhere.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import torch

from megalite import launch, models
from megalite.config import Config
from megalite.tune.parity import batch_of, microbatches, start_engine

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
WARM_UP = 2


def config_of(mesh: dict[str, int], *, layers: int, width: int, batch: int) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": layers, "width": width, "heads": 4, "vocab": 2048, "sequence": 128},
            "mesh": mesh,
            "train": {"global_batch": batch, "micro_batch": 2, "precision": "fp32"},
        }
    )


def time_ours(rank: int, *, config: Config, document: dict[str, Any], steps: int) -> list[float]:
    """Seconds of each step after the warm-up."""
    engine, seconds = start_engine(config, document), []
    for step in range(steps + WARM_UP):
        mine = microbatches(batch_of(config, step), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
        began = time.perf_counter()
        engine.step(step, mine)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def time_deepspeed(rank: int, *, config: Config, steps: int) -> list[float]:
    """The same model and batch the way DeepSpeed's documentation does it: ZeRO-3 over all ranks, its own accumulation and AdamW."""
    import deepspeed
    import torch.distributed as dist

    from megalite.parallel import mends

    mends.start()
    world, train = dist.get_world_size(), config.train
    accumulate = train.global_batch // (world * train.micro_batch)
    settings = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": train.clip,
        "zero_allow_untested_optimizer": True,
        **ZERO3,
    }
    whole = models.build(config.model, seed=1)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=config.optimizer.lr)
    engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)
    seconds = []
    for step in range(steps + WARM_UP):
        mine = microbatches(batch_of(config, step), config, dp=world, dp_rank=rank)
        began = time.perf_counter()
        for batch in mine:
            batch["weights"] = torch.full(batch["labels"].shape, 1 / batch["labels"].numel())
            engine.backward(engine(batch).sum())
            engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 8), ("steps", 8), ("rounds", 3), ("layers", 4), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    half = max(1, asked.ranks // 4)
    mesh, flat = {"dp": half, "pp": 2, "tp": 2}, {"dp": asked.ranks}
    of = functools.partial(config_of, layers=asked.layers, width=asked.width, batch=8 * asked.ranks)
    said = f"dp {half} x pp 2 x tp 2"
    variants = {
        f"megalite {said}, ZeRO-3": functools.partial(time_ours, config=of(mesh), document=ZERO3),
        f"megalite {said}, no ZeRO": functools.partial(time_ours, config=of(mesh), document={}),
        f"megalite dp {asked.ranks}, ZeRO-3": functools.partial(time_ours, config=of(flat), document=ZERO3),
        f"megalite dp {asked.ranks}, no ZeRO": functools.partial(time_ours, config=of(flat), document={}),
        f"DeepSpeed dp {asked.ranks}, ZeRO-3": functools.partial(time_deepspeed, config=of(flat)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(asked.rounds):
        for name, work in variants.items():
            ranks = launch.run_ranks(asked.ranks, functools.partial(work, steps=asked.steps), warm=("megalite.engine",))
            seconds[name] += [max(step) for step in zip(*ranks, strict=True)]
            print(f"round {number + 1}: {name}: {statistics.median(seconds[name]):.3f} s", flush=True)
    first = statistics.median(next(iter(seconds.values())))
    for name, found in seconds.items():
        print(f"{name:40s} {statistics.median(found) / first:5.2f}")


if __name__ == "__main__":
    main()
