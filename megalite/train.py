"""Pretraining, on one page: open the data, build the engine, resume, step until done.

In: a `Config`.  Out: the run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, logs/. Running the same config again
resumes from the newest checkpoint; every sample, weight and number is then what the uninterrupted run would have had.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

import megalite
from megalite import hardware, models
from megalite.checkpoint.resume import find as find_checkpoint
from megalite.checkpoint.store import Store
from megalite.config import Config, run_folder
from megalite.data.loader import Loader, open_train, open_valid
from megalite.ds_config import read_document
from megalite.engine import Engine
from megalite.errors import UserError
from megalite.evaluate.validate import validate
from megalite.mesh import Mesh
from megalite.models import counts
from megalite.observe.metrics import Metrics, Yardstick


def train(config: Config, rank: int) -> dict[str, float]:
    """Train on this rank until config.train.steps; returns the parts of the last validation loss ({} without validation shards)."""
    folder, mesh = run_folder(config), start_mesh(config, rank)
    engine = Engine(config, mesh, document=read_document(config))
    store = Store(folder / "checkpoints", keep=config.checkpoint.keep, tied=models.tied(config.model))
    step, valid = resume(config, engine, store), {}
    with (
        open_loader(config, mesh) as loader,
        open_validation(config, mesh) as held_out,
        Metrics(
            folder,
            rank=rank,
            world=mesh.world,
            total_steps=config.train.steps,
            yardstick=measure(config, mesh),
            log=config.log,
            start_step=step,
        ) as metrics,
    ):
        while step < config.train.steps:
            report = engine.step(step, loader.step(step))
            step += 1
            if report.skipped:
                metrics.skipped(step, engine.state()["value"])
            else:
                check_finite(step, report.loss, report.grad_norm)
            metrics.step(step, loss=report.loss, grad_norm=report.grad_norm, lr=report.lr)
            if held_out and due(step, config.validation.every, config):
                with metrics.pause():
                    valid = validate(engine, held_out, batches=config.validation.batches)
                metrics.valid(step, sum(valid.values()))
            if due(step, config.checkpoint.every, config):
                with metrics.pause():
                    store.save(step, engine.zero.pieces(), facts(config, engine, valid))
    return valid


def due(step: int, every: int, config: Config) -> bool:
    """Whether something that happens every so many steps (0: only at the end) happens after this one."""
    return step == config.train.steps or (every > 0 and step % every == 0)


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Stop a run whose numbers are gone: training on would only write them into the next checkpoint."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; lower optimizer.lr or train.clip, or raise optimizer.warmup, "
            "and run again: it resumes from the last checkpoint"
        )


def resume(config: Config, engine: Engine, store: Store) -> int:
    """Load what config.checkpoint.resume asks for; returns how many steps have been taken."""
    found = [find_checkpoint(config)]
    dist.broadcast_object_list(found)  # one decides for all: a shared disk may show ranks different folders
    path = found[0]
    if path is None:
        return 0
    said = store.load(path, engine.zero.pieces())
    engine.restore(said["step"], said.get("state", {}))
    return said["step"]


def facts(config: Config, engine: Engine, valid: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says of itself beside its tensors."""
    return {
        "config": config.model_dump(mode="json"),
        "valid": valid,
        "state": engine.state(),
        "world": dist.get_world_size(),
        "versions": {"megalite": megalite.__version__, "torch": torch.__version__},
    }


def start_mesh(config: Config, rank: int) -> Mesh:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    assert config.mesh.dp is not None and rank == dist.get_rank()
    return Mesh.start(**config.mesh.degrees, device=device)


def open_loader(config: Config, mesh: Mesh) -> Loader:
    opened = open_train(config.data, model=config.model, seed=config.run.seed)
    return _loader(config, mesh, opened.source)


def open_validation(config: Config, mesh: Mesh) -> AbstractContextManager[Loader | None]:
    opened = open_valid(config.data, model=config.model)
    return _loader(config, mesh, opened.source) if opened else nullcontext()


def _loader(config: Config, mesh: Mesh, source: Any) -> Loader:
    batch = config.train
    return Loader(source, global_batch=batch.global_batch, micro_batch=batch.micro_batch, dp=mesh.dp, dp_rank=mesh.dp_rank)


def measure(config: Config, mesh: Mesh) -> Yardstick:
    """Tokens and FLOPs of a step, and this GPU's peak where it is known."""
    gpu = hardware.find(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
    return Yardstick(
        tokens_per_step=config.train.global_batch * config.sequence,
        flops_per_step=counts.step_flops(config.model, config.sequence, config.train.global_batch),
        peak_flops=gpu.peak(config.train.precision) if gpu else None,
    )
