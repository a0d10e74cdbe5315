"""Pretraining, on one page: open the data, build the engine, resume, step until done.

In: a `Config`.  Out: the run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, logs/. Running the same config again
resumes from the newest checkpoint; every sample, weight and number is then what the uninterrupted run would have had.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

import megalite
from megalite import hardware, models
from megalite.checkpoint.resume import find as find_checkpoints
from megalite.checkpoint.resume import pass_over
from megalite.checkpoint.store import Damaged, Store
from megalite.config import Config, run_folder
from megalite.data.loader import Loader, Opened, open_train, open_valid
from megalite.ds_config import read_document
from megalite.engine import Engine
from megalite.errors import UserError
from megalite.evaluate.validate import validate
from megalite.mesh import Mesh
from megalite.models import counts
from megalite.observe.metrics import Metrics, Yardstick

LOG = logging.getLogger(__name__)


def train(config: Config, rank: int) -> None:
    """Train on this rank until config.train.steps."""
    folder, mesh = run_folder(config), start_mesh(config, rank)
    engine = Engine(config, mesh, document=read_document(config))
    opened = open_train(config.data, model=config.model, seed=config.run.seed)
    valid: dict[str, Any] = {"valid": {}, "valid_step": None}
    with Store(folder / "checkpoints", config.checkpoint, tied=models.tied(config.model)) as store:
        step = resume(config, engine, store)
        with (
            deal(config, mesh, opened) as loader,
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
                check_finite(step, report.loss, report.grad_norm)
                metrics.step(step, loss=report.loss, grad_norm=report.grad_norm, lr=report.lr)
                if held_out and due(step, config.validation.every, config):
                    with metrics.pause():
                        valid = {"valid": validate(engine, held_out, batches=config.validation.batches), "valid_step": step}
                    metrics.valid(step, sum(valid["valid"].values()))
                if due(step, config.checkpoint.every, config):
                    with metrics.pause():
                        store.save(step, engine.zero.pieces(), {**facts(config, opened), **valid})
        check_saved(store)


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


def check_saved(store: Store) -> None:
    """Wait for the last checkpoint; a run whose end is not on disk has failed."""
    if failure := store.settle():
        raise UserError(f"the last checkpoint could not be saved: {failure}; make room and run again: it resumes from the one before")


def resume(config: Config, engine: Engine, store: Store) -> int:
    """Load what config.checkpoint.resume asks for, an older one where that was damaged; returns how many steps have been taken."""
    found = [find_checkpoints(config)]
    dist.broadcast_object_list(found)  # one decides for all: a shared disk may show ranks different folders
    for path in found[0]:
        try:
            step = store.load(path, engine.zero.pieces())["step"]
        except Damaged as error:
            if path == found[0][-1]:
                raise
            if dist.get_rank() == 0:
                LOG.warning("%s", pass_over(error))
        else:
            engine.zero.restore(step)
            return step
    return 0


def facts(config: Config, opened: Opened) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    return {
        "config": config.model_dump(mode="json"),
        "tokenizer": opened.tokenizer.fingerprint if opened.tokenizer else None,
        "mesh": config.mesh.model_dump(mode="json"),
        "versions": {"megalite": megalite.__version__, "torch": torch.__version__, "deepspeed": version("deepspeed")},
    }


def start_mesh(config: Config, rank: int) -> Mesh:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    assert config.mesh.dp is not None and rank == dist.get_rank()
    return Mesh.start(dp=config.mesh.dp, pp=config.mesh.pp, tp=config.mesh.tp, device=device)


def open_validation(config: Config, mesh: Mesh) -> AbstractContextManager[Loader | None]:
    opened = open_valid(config.data, model=config.model)
    return deal(config, mesh, opened) if opened else nullcontext()


def deal(config: Config, mesh: Mesh, opened: Opened) -> Loader:
    """This rank's microbatches of those samples."""
    batch = config.train
    return Loader(opened.source, global_batch=batch.global_batch, micro_batch=batch.micro_batch, dp=mesh.dp, dp_rank=mesh.dp_rank)


def measure(config: Config, mesh: Mesh) -> Yardstick:
    """Tokens and FLOPs of a step, and this GPU's peak where it is known."""
    sequence = config.data.sequence or config.model.sequence
    gpu = hardware.find(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
    return Yardstick(
        tokens_per_step=config.train.global_batch * sequence,
        flops_per_step=counts.step_flops(config.model, sequence, config.train.global_batch),
        peak_flops=gpu.peak(config.train.precision) if gpu else None,
    )
