"""Pretraining, on one page: open the data, build the engine, resume, step until done.

In: a `Config`.  Out: the run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, logs/. Running the same config again
resumes from the newest checkpoint; every sample, weight and number is then what the uninterrupted run would have had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

import megalite
from megalite import hardware, models
from megalite.checkpoint.resume import find, newest, pass_over
from megalite.checkpoint.store import Damaged, Store
from megalite.config import Config, run_folder
from megalite.data.loader import Loader, Source, open_train, open_valid
from megalite.data.tokenizer import Tokenizer
from megalite.ds_config import read_document
from megalite.engine import Engine, start_mesh
from megalite.errors import UserError
from megalite.evaluate.validate import validate
from megalite.mesh import Mesh
from megalite.models import counts
from megalite.observe.guard import Guard, Rewind
from megalite.observe.metrics import Metrics, Yardstick
from megalite.observe.watch import Watch

LOG = logging.getLogger(__name__)


Judge = Callable[[Engine], dict[str, Any]]
"""Validates: {"valid": the parts of the mean loss}, and for a task "scores" and "score", by which the best checkpoint is chosen."""


@dataclass(frozen=True)
class Material:
    """What a run learns from and is judged by."""

    source: Source
    tokenizer: Tokenizer | None
    length: float
    """Mean tokens of a sample, its padding included."""
    judge: Callable[[], AbstractContextManager[Judge | None]]


@dataclass
class Run:
    """Everything that lives as long as the ranks do; `best` is the score and step of the best validation, and how many came since."""

    config: Config
    mesh: Mesh
    engine: Engine
    material: Material
    store: Store
    guard: Guard
    watch: Watch
    best: dict[str, Any] = field(default_factory=dict)
    done: bool = False


def train(config: Config, rank: int, *, open_material: Callable[[Config, Mesh], Material] | None = None) -> str | None:
    """Train on this rank until config.train.steps, or until it stops getting better where the task says so; returns the name of the signal,
    or file, that ended it earlier, or None. `open_material`: what is learned where it is no pretraining.
    """
    mesh = start_mesh(config, rank)
    engine, guard = Engine(config, mesh, document=read_document(config)), Guard(config.watch)
    engine.zero.refuse = guard.refuses if config.watch.bad_step == "skip" else None
    material = (open_material or open_pretraining)(config, mesh)
    with (
        Store(run_folder(config) / "checkpoints", config.checkpoint, tied=models.tied(config.model)) as store,
        Watch(config.watch, run_folder(config)) as watch,
    ):
        run = Run(config, mesh, engine, material, store, guard, watch)
        step, stopped = resume(run, find), None
        store.make_room(engine.zero.pieces())
        while step < config.train.steps and not stopped and not run.done:
            try:
                step, stopped = advance(run, step)
            except Rewind as bad:
                step = rewind(run, bad)
        if failure := store.settle():
            raise UserError(f"the last checkpoint could not be saved: {failure}; make room and run again: it resumes from the one before")
    return stopped


def advance(run: Run, step: int) -> tuple[int, str | None]:
    """Step until the last step or until asked to end; returns how many steps have been taken, and what asked."""
    config, engine, stopped = run.config, run.engine, None
    valid: dict[str, Any] = {"valid": {}, "valid_step": None}
    with (
        deal(config, run.mesh, run.material.source) as loader,
        run.material.judge() as judge,
        Metrics(
            run_folder(config),
            rank=run.mesh.rank,
            world=run.mesh.world,
            total_steps=config.train.steps,
            yardstick=measure(config, run.mesh, run.material.length),
            log=config.log,
            start_step=step,
        ) as metrics,
    ):
        while step < config.train.steps and not stopped and not run.done:
            run.watch.enter(f"step {step + 1}")
            report = engine.step(step, loader.step(step + run.guard.shift))
            step += 1
            run.guard.judge(step, report.loss, report.grad_norm, skipped=report.skipped)
            if report.skipped:
                metrics.skipped(step, engine.state().get("value"))
            metrics.step(step, loss=report.loss, grad_norm=report.grad_norm, lr=report.lr)
            asked = run.watch.heed()
            stopped = asked.end
            if judge and not stopped and due(step, config.validation.every, config):
                run.watch.enter(f"validation after step {step}")
                with metrics.pause():
                    valid = {**judge(engine), "valid_step": step}
                metrics.valid(step, sum(valid["valid"].values()), valid.get("scores", {}))
                run.done = improves(run, step, valid.get("score"))
            if stopped or asked.save or run.done or due(step, config.checkpoint.every, config):
                run.watch.enter(f"saving step {step}")
                with metrics.pause():
                    run.store.save(step, engine.zero.pieces(), {**facts(run), **valid})
    return step, stopped


def improves(run: Run, step: int, score: float | None) -> bool:
    """Note the score; whether so many came since the best that training is done."""
    if score is None or run.config.task is None:
        return False
    if not run.best or score > run.best["score"]:
        run.best = {"score": score, "step": step, "since": 0}
    else:
        run.best["since"] += 1
    patience = run.config.task.patience
    done = 0 < patience <= run.best["since"]
    if done and dist.get_rank() == 0:
        LOG.info("no better score than that of step %d in %d validations: done", run.best["step"], patience)
    return done


def due(step: int, every: int, config: Config) -> bool:
    """Whether something that happens every so many steps (0: only at the end) happens after this one."""
    return step == config.train.steps or (every > 0 and step % every == 0)


def resume(run: Run, find: Any) -> int:
    """Load the first sound one of the checkpoints that `find(config)` names; returns how many steps have been taken."""
    found = [find(run.config)]
    dist.broadcast_object_list(found)  # one decides for all: a shared disk may show ranks different folders
    for path in found[0]:
        try:
            run.watch.enter(f"loading {path.name}")
            said = run.store.load(path, run.engine.zero.pieces())
        except Damaged as error:
            if path == found[0][-1]:
                raise
            if dist.get_rank() == 0:
                LOG.warning("%s", pass_over(error))
        else:
            run.guard.restore(said.get("guard", {}))
            run.best, run.done = said.get("best", {}), said.get("done", False)
            run.engine.restore(said["step"] - run.guard.skipped, said.get("state", {}))
            return said["step"]
    return 0


def rewind(run: Run, bad: Rewind) -> int:
    """Go back to the last checkpoint, to go on from there with the batches after the bad one (PaLM: arXiv:2204.02311, section 5.1)."""
    run.store.settle()
    rewound, end = run.guard.rewound, bad.step + run.guard.shift
    step = resume(run, newest)
    run.guard.go_back(bad, to=step, rewound=rewound, batches=end - step - run.guard.shift)
    return step


def facts(run: Run) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    tokenizer = run.material.tokenizer
    return {
        "config": run.config.model_dump(mode="json"),
        "state": run.engine.state(),
        "guard": run.guard.state(),
        "best": run.best,
        "done": run.done,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "mesh": run.config.mesh.model_dump(mode="json"),
        "versions": {"megalite": megalite.__version__, "torch": torch.__version__, "deepspeed": version("deepspeed")},
    }


def open_pretraining(config: Config, mesh: Mesh) -> Material:
    """Shards: the blend of all to train on, one in order to validate on."""
    opened = open_train(config.data, model=config.model, seed=config.run.seed)
    held_out = open_valid(config.data, model=config.model)

    @contextmanager
    def judge() -> Iterator[Judge | None]:
        if held_out is None:
            yield None
            return
        with deal(config, mesh, held_out.source) as loader:
            yield lambda engine: {"valid": validate(engine, loader, batches=config.validation.batches)}

    return Material(opened.source, opened.tokenizer, config.sequence, judge)


def deal(config: Config, mesh: Mesh, source: Source) -> Loader:
    """This rank's microbatches of those samples."""
    batch = config.train
    return Loader(source, global_batch=batch.global_batch, micro_batch=batch.micro_batch, dp=mesh.dp, dp_rank=mesh.dp_rank)


def measure(config: Config, mesh: Mesh, length: float) -> Yardstick:
    """Tokens and FLOPs of a step, and this GPU's peak where it is known."""
    gpu = hardware.find(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
    return Yardstick(
        tokens_per_step=round(config.train.global_batch * length),
        flops_per_step=counts.step_flops(config.model, round(length), config.train.global_batch),
        peak_flops=gpu.peak(config.train.precision) if gpu else None,
    )
