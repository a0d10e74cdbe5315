"""Training throughput on one GPU: our engine under ZeRO-3, beside plain PyTorch with torch.compile and transformers with DeepSpeed ZeRO-3.

    python tests/gpu/bench_training.py [--models gpt2-124m gpt-1.3b] [--steps 8] [--output docs/benchmarks/training.json]

The same shapes, random ids, microbatches, global batch, bf16 and AdamW for all three, each in a process of its own, one after another. What
is said is the median step after the warm-up; tokens/s and MFU as in megalite/tune/bench.py. Plain PyTorch keeps fp32 weights and computes
under autocast; its blocks are compiled one by one, as ours are. One that runs out of memory is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 3
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {  # layers, width, heads, sequence; sequences a microbatch, a step
    "gpt2-124m": (12, 768, 12, 1024, 64, 512),
    "gpt-350m": (24, 1024, 16, 2048, 16, 128),  # GPT-3 Medium
    "gpt-1.3b": (24, 2048, 16, 2048, 8, 64),
    "gpt-2.7b": (32, 2560, 32, 2048, 4, 64),
}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 4_000_000_000,
    "stage3_max_reuse_distance": 4_000_000_000,
}
Step = Callable[[int], None]


def config_of(name: str, *, micro: int | None, batch: int | None) -> Any:
    from megalite.config import Config

    layers, width, heads, sequence, usual, whole = SHAPES[name]
    return Config.model_validate(
        {
            "name": name,
            "model": {"layers": layers, "width": width, "heads": heads, "vocab": 50257, "sequence": sequence},
            "mesh": {"dp": 1},
            "train": {"micro_batch": micro or usual, "global_batch": batch or whole, "precision": "bf16", "steps": 10_000},
        }
    )


def ours(config: Any) -> Step:
    import torch

    from megalite import models
    from megalite.tune.parity import batch_of, microbatches, start_engine

    models.draw = lambda name, shape, **_: torch.randn(shape, device="cuda") * 0.02  # ours, on the CPU, take longer than the benchmark
    engine = start_engine(config, {"zero_optimization": ZERO3}, device="cuda:0")
    dealt = microbatches(batch_of(config, 0), config, dp=1, dp_rank=0)
    return lambda step: engine.step(step, dealt)


def plain(config: Any) -> Step:
    import torch
    from torch import nn

    from megalite import models
    from megalite.models import attention, layers

    attention.is_fused = lambda q, *, dropout=False: False  # SDPA and PyTorch's own cross-entropy
    attention._has_cudnn = lambda *_: False
    layers.has_fused_loss = lambda x: False
    whole = models.build(config.model, seed=1, device="meta").to_empty(device="cuda")
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name in whole.order:
        whole.get_submodule(name).compile()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4, fused=True)
    dealt = _dealt(config)
    for batch in dealt:
        batch["weights"] = torch.full(batch["labels"].shape, 1 / batch["labels"].numel() / len(dealt), device="cuda")

    def step(_: int) -> None:
        total = torch.zeros((), device="cuda")
        for batch in dealt:
            with torch.autocast("cuda", torch.bfloat16):
                loss = whole(batch).sum()
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def transformers(config: Any) -> Step:
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model, train = config.model, config.train
    deepspeed.init_distributed("nccl", auto_mpi_discovery=False, verbose=False)
    shape = GPT2Config(
        n_layer=model.layers, n_embd=model.width, n_head=model.heads, n_positions=model.sequence, vocab_size=model.vocab,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("cuda"):
        whole = GPT2LMHeadModel(shape).to(torch.bfloat16)
    settings = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // train.micro_batch,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": ZERO3,
    }
    engine, *_ = deepspeed.initialize(model=whole, optimizer=torch.optim.AdamW(whole.parameters(), lr=1e-4, fused=True), config=settings)
    dealt = _dealt(config)

    def step(_: int) -> None:
        for batch in dealt:
            loss = engine(input_ids=batch["ids"], labels=batch["ids"]).loss
            engine.backward(loss)
            engine.step()
        loss.item()

    return step


def _dealt(config: Any) -> list[dict[str, Any]]:
    from megalite.tune.parity import batch_of, microbatches

    dealt = microbatches(batch_of(config, 0), config, dp=1, dp_rank=0)
    return [{name: value.to("cuda") for name, value in batch.items()} for batch in dealt]


def ours_compiled(config: Any) -> Step:
    return ours(config.model_copy(update={"train": config.train.model_copy(update={"compile": True})}))


SYSTEMS = {
    "megalite, ZeRO-3, compiled": ours_compiled,
    "megalite, ZeRO-3": ours,
    "PyTorch, torch.compile": plain,
    "transformers, DeepSpeed ZeRO-3": transformers,
}


def measure(system: str, config: Any, *, steps: int) -> dict[str, Any]:
    """In this process."""
    port = random.SystemRandom().randrange(10_000, 30_000)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    import torch
    import torch.distributed as dist

    from megalite.tune import bench

    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    step, seconds = SYSTEMS[system](config), []
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    found = bench.summarise(config, seconds[WARM_UP:], world=1, device=name, memory=memory, shares={})
    return {**found, "system": system, "versions": {**bench._surroundings()["versions"], "cudnn": torch.backends.cudnn.version()}}


def compete(name: str, systems: list[str], arguments: list[str], *, timeout: float) -> list[dict[str, Any]]:
    """One row a system; one that fails is a row with its last line."""
    rows = []
    for system in systems:
        command = [sys.executable, __file__, "--one", system, "--models", name, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
            said = [line for line in done.stderr.splitlines() if "Error" in line][-1:] or [f"exit code {done.returncode}"]
            row = found[0] if found else {"name": name, "system": system, "failed": said[0][:300]}
        except subprocess.TimeoutExpired:
            row = {"name": name, "system": system, "failed": f"not done after {timeout:g} s"}
        rows.append(row)
        print(line_of(row), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['name']} | {row['system']} | {row['failed']} |"
    rates = f"{row['tokens_per_second']:,.0f} | {row['tflops_per_gpu']:.0f} | {row['mfu'] or 0:.1%}"
    return f"| {row['name']} | {row['system']} | {rates} | {row['seconds']['median']:.3f} | {row['memory_bytes'] / 2**30:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--global-batch", type=int)
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS])
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=[*SYSTEMS], help="measure this system alone, in this process")
    asked = parser.parse_args()
    if asked.one:
        config = config_of(asked.models[0], micro=asked.micro_batch, batch=asked.global_batch)
        print(json.dumps(measure(asked.one, config, steps=asked.steps)))
        return
    given = {"--steps": asked.steps, "--micro-batch": asked.micro_batch, "--global-batch": asked.global_batch}
    arguments = [word for flag, value in given.items() if value for word in (flag, str(value))]
    print("| model | system | tokens/s | TFLOP/s | MFU | s a step | GiB |\n|---|---|---|---|---|---|---|")
    rows = [row for name in asked.models for row in compete(name, asked.systems, arguments, timeout=asked.timeout)]
    if asked.output:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
