"""What `megalite finetune` does: rows into examples, another model's weights into step 0 of a run, then the loop that pretraining has.

In: a run's document whose `task` says what for.  Out: the run folder: config.yaml, tokenizer/, metrics.jsonl, checkpoints/ with the newest
and the best by the task's score. Everything is a function of seed and step, so any mesh trains alike, and the same command resumes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite import launch
from megalite.checkpoint import lock
from megalite.checkpoint.retention import whole
from megalite.checkpoint.store import read_facts
from megalite.config import Config, Model, merge, parse, run_folder
from megalite.convert.importing import copy_tokenizer
from megalite.convert.starting import Start, find_checkpoint, open_start, write_start
from megalite.data.examples import Examples
from megalite.data.grouped import Batches, Once, Shuffled, balance
from megalite.data.lessons import check_family, read_lessons
from megalite.data.tokenizer import open_tokenizer
from megalite.ds_config import read_document
from megalite.errors import UserError
from megalite.fit import resolve_mesh
from megalite.log import open_voice, quiet_foreign
from megalite.pretrain import is_finished, say, train_on_ranks, write_config
from megalite.task import SCORES, Task

HEADS = {"classify": "classify", "regress": "regress", "tag": "tag"}
FREE = ("dropout", "attention_dropout")  # settings of the model that a fine-tuning may choose
DEFAULTS: dict[str, Any] = {  # as BERT and RoBERTa were fine-tuned (arXiv:1810.04805, appendix A.3; arXiv:1907.11692, table 10)
    "model": {"dropout": 0.1},
    "train": {"global_batch": 32, "micro_batch": 8},
    "optimizer": {"lr": 5e-5, "betas": (0.9, 0.999), "weight_decay": 0.01, "schedule": "linear", "min_lr": 0.0},
    "checkpoint": {"keep": 1, "keep_best": True},
}
WARMUP = 0.06  # share of the steps


@dataclass(frozen=True)
class Lessons:
    """Examples to learn from and to be judged by."""

    train: Examples
    valid: Examples | None


def finetune(document: dict[str, Any], *, command: str) -> None:
    """Read, begin, train what is left, report. `document`: the nested settings that a run file and flags give, defaults left out."""
    quiet_foreign()
    parse(_without_trunk(document), source="megalite finetune")  # typing errors are answered before anything is read
    task = Task.model_validate(document["task"])
    start = open_start(task.start)
    check_family(task, start.model.family, start.tokenizer)
    document, lessons = read(document, start)
    config = parse(document, source="megalite finetune")
    config = resolve_mesh(config, launch.count_ranks(config))
    zero = read_document(config)
    folder = run_folder(config)
    with lock.hold(folder) if launch.is_rank_zero() else nullcontext():
        if launch.is_rank_zero():
            begin(config, start, lessons)
        if not is_finished(config):
            train_on_ranks(config, functools.partial(_train, lessons=lessons), zero)
    if launch.is_rank_zero():
        report(config, command=command)


def read(document: dict[str, Any], start: Start) -> tuple[dict[str, Any], Lessons]:
    """The document completed by what the rows and the model decide, and the examples."""
    early = parse(merge(DEFAULTS, _without_trunk(document)), source="megalite finetune")
    assert early.task is not None
    limit = min(early.data.sequence or start.model.sequence, start.model.sequence)
    task, train, valid = read_lessons(early.task, start.tokenizer, family=start.model.family, limit=limit, folder=start.tokenizer_source)
    heads = {"head": HEADS.get(task.kind, "pretrain"), "labels": max(1, len(task.labels)) if task.kind != "regress" else 1}
    model = _model(document.get("model", {}), start.model, {**heads, **{name: getattr(early.model, name) for name in FREE}})
    lengths = [len(example.ids) for examples in (train, valid) if examples for example in examples.found]
    unit = math.lcm(8, math.prod(early.sequence_parts.values()))
    longest = min(-(-max(lengths) // unit) * unit, limit)
    epoch = max(1, len(train.found) // early.train.global_batch)
    steps = early.train.steps if "steps" in document.get("train", {}) else max(1, round(epoch * task.epochs))
    decided = {
        "name": document.get("name", task.kind),
        "run": {"folder": str(run_folder(early)) if document.get("run", {}).get("folder") else f"runs/{task.kind}"},
        "data": {"sequence": longest, "tokenizer": None},
        "train": {"steps": steps, "precision": "bf16" if torch.cuda.is_available() else "fp32"},
        "optimizer": {"warmup": max(1, round(WARMUP * steps))},
        "validation": {"every": min(epoch, steps)},
        "checkpoint": {"every": document.get("validation", {}).get("every") or min(epoch, steps)},
    }
    filled = merge(merge(DEFAULTS, decided), document)
    filled["data"]["sequence"] = document.get("data", {}).get("sequence") or longest
    filled["model"] = model.model_dump(mode="json")
    filled["task"] = task.model_dump(mode="json")
    filled["data"]["tokenizer"] = f"{filled['run']['folder']}/tokenizer"
    return filled, Lessons(train, valid)


def _without_trunk(document: dict[str, Any]) -> dict[str, Any]:
    """Only the model that is fine-tuned can say whether settings of its trunk fit."""
    return document | {"model": {name: value for name, value in document.get("model", {}).items() if name in FREE}}


def _model(asked: dict[str, Any], start: Model, decided: dict[str, Any]) -> Model:
    """The start's model under the task's head. Raises UserError where another trunk was asked for."""
    known = start.model_dump(mode="json") | decided
    for name, value in asked.items():
        if name not in FREE and str(value) != str(known.get(name)):
            raise UserError(
                f"model.{name} = {value}, but the model that is fine-tuned has {known.get(name)}; only {' and '.join(FREE)} may be chosen"
            )
    return Model.model_validate(known)


def begin(config: Config, start: Start, lessons: Lessons) -> None:
    """What a run folder needs before ranks start: tokenizer, step 0, config.yaml; says what was read."""
    assert config.task is not None
    folder = run_folder(config)
    for name, examples in (("training", lessons.train), ("validation", lessons.valid)):
        if examples is not None:
            bad = "".join(f"; {count:,} left out: {why}" for why, count in examples.faults.counts.items())
            cut = f"; {examples.cut:,} cut to {config.sequence} tokens" if examples.cut else ""
            say(f"{name:<12} {len(examples.found):,} examples{cut}{bad}")
            for place in examples.faults.places:
                say(f"             {place}")
    if not whole(folder / "checkpoints"):
        source = Path(start.tokenizer_source)
        if not source.is_dir() or copy_tokenizer(source, folder / "tokenizer")[0] is None:
            start.tokenizer.save(folder / "tokenizer")
        assert open_tokenizer(folder / "tokenizer").fingerprint == start.tokenizer.fingerprint
        drawn = write_start(folder / "checkpoints", config, start)
        say(f"from         {config.task.start}" + (f"; drawn by seed {config.run.seed}: {', '.join(drawn)}" if drawn else ""))
    write_config(config)


def _train(config: Config, rank: int, *, lessons: Lessons) -> str | None:
    from megalite.train import train  # DeepSpeed takes seconds to import

    quiet_foreign()
    open_voice(rank, own_log=True)
    return train(config, rank, open_material=functools.partial(open_material, lessons=lessons))


def open_material(config: Config, mesh: Any, *, lessons: Lessons) -> Any:
    """What the loop of pretraining learns from and is judged by."""
    from megalite.evaluate.examine import batches_of, examine  # as train: DeepSpeed takes seconds to import
    from megalite.train import Judge, Material, deal

    task = config.task
    assert task is not None
    tokenizer = open_tokenizer(str(config.data.tokenizer))
    weights = balance(lessons.train.found, len(task.labels)) if task.class_weights == "balanced" else ()
    training: Batches = batches_of(config, lessons.train.found, tokenizer, weights=weights)
    source = Shuffled(training, global_batch=config.train.global_batch, seed=config.run.seed, group=task.group_lengths)

    @contextmanager
    def judge() -> Iterator[Judge | None]:
        if lessons.valid is None:
            yield None
            return
        once = Once(batches_of(config, lessons.valid.found, tokenizer), global_batch=config.train.global_batch)
        with deal(config, mesh, once) as loader:
            yield lambda engine: _verdict(examine(engine, once, loader, task=task), task)

    return Material(source, tokenizer, source.mean_length, judge)


def _verdict(found: dict[str, Any], task: Task) -> dict[str, Any]:
    name = SCORES[task.kind]
    score = -found["loss"] if name == "loss" else found[name]
    return {"valid": {"loss": found["loss"]}, "scores": {key: value for key, value in found.items() if key != "loss"}, "score": score}


def report(config: Config, *, command: str) -> None:
    """The end of a run, on the console."""
    assert config.task is not None
    folder = run_folder(config)
    best = find_checkpoint(str(folder)) or whole(folder / "checkpoints")[-1]
    facts = read_facts(best)
    if facts.get("score") is not None:
        numbers = {**facts["valid"], **facts["scores"]}
        said = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float))
        say(f"best         step {facts['step']}, by {SCORES[config.task.kind]}: {said}")
        (folder / "scores.json").write_text(json.dumps({"step": facts["step"], **numbers}, indent=2) + "\n")
    say(f"run folder   {folder}/ (config.yaml, metrics.jsonl, logs/)")
    say(f"checkpoint   {best}/")
    say(f"evaluate     megalite evaluate {folder} --data FILE")
    say(f"resume       megalite {command}   (stopped or killed: it goes on where it was)")
