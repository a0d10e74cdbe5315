"""Examines a fine-tuned model on the training mesh: its loss on held-out examples, what it answers, the scores of that.

In: an engine, the held-out examples in batches, the task.  Out: the same on every rank: the mean loss, and scores by name. Every example
counts once; samples that only fill the last batch count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalite import models
from megalite.config import Config
from megalite.data.examples import GENERATING, IGNORE, Example
from megalite.data.grouped import Batches, Once
from megalite.data.loader import Loader
from megalite.data.tokenizer import Tokenizer
from megalite.engine import Engine
from megalite.evaluate import scores
from megalite.task import Task


@dataclass(frozen=True)
class Answers:
    """Of every example, in the order of the examination: what the head put out, (n,) numbers or (s, n) for tags."""

    outputs: list[np.ndarray]
    order: np.ndarray


def examine(engine: Engine, once: Once, loader: Loader, *, task: Task) -> dict[str, Any]:
    """{"loss": ..., and the task's scores}."""
    answering = task.kind not in GENERATING
    total = weight = 0.0
    mine: list[tuple[int, list[np.ndarray]]] = []
    for number in range(once.num_steps):
        microbatches = loader.step(number)
        counted = _count(engine, microbatches)
        parts, answers = engine.predict(microbatches) if answering else (engine.validate(microbatches), [])
        total, weight = total + sum(parts.values()) * counted, weight + counted
        if answers and engine.mesh.tp_rank == 0:
            mine.append((number, [_reduce(answer, task) for answer in answers]))
    found: dict[str, Any] = {"loss": total / weight}
    if answering:
        found |= _score(_collect(engine, once, mine), once, task)
    else:
        found |= {"perplexity": float(np.exp(min(found["loss"], 700.0)))}
    return found


def _count(engine: Engine, microbatches: list[dict[str, torch.Tensor]]) -> float:
    """What the targets of a global batch count, over the mesh."""
    counted = torch.stack([models.weigh(batch)[1].sum().double() for batch in microbatches]).sum().to(engine.mesh.device, torch.float32)
    dist.all_reduce(counted, group=engine.mesh.group("dp"))
    return float(counted)


def _reduce(answer: torch.Tensor, task: Task) -> np.ndarray:
    """What is sent: a tag's number for every token, else all numbers of a sample."""
    return (answer.argmax(-1) if task.kind == "tag" else answer.float()).cpu().numpy()


def _collect(engine: Engine, once: Once, mine: list[tuple[int, list[np.ndarray]]]) -> Answers:
    """Everyone's answers, on every rank, in the order of the samples."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (engine.mesh.dp_rank, mine) if mine else None)
    steps: dict[int, dict[int, list[np.ndarray]]] = {}
    for entry in filter(None, everyone):
        for number, answers in entry[1]:
            steps.setdefault(number, {})[entry[0]] = answers
    outputs = []
    for number in range(once.num_steps):
        rows = [row for rank in sorted(steps[number]) for answer in steps[number][rank] for row in answer]
        outputs += rows[: len(once.order) - number * once.size]
    return Answers(outputs, once.order)


def _score(answers: Answers, once: Once, task: Task) -> dict[str, Any]:
    examples = [once.batches.examples[int(number)] for number in answers.order]
    if task.kind == "classify":
        return scores.classify([int(e.target) for e in examples], [int(o.argmax()) for o in answers.outputs], task.labels)
    if task.kind == "regress":
        return scores.regress([e.target for e in examples], [float(o[0]) for o in answers.outputs])
    wanted, given = [], []
    for example, output in zip(examples, answers.outputs, strict=True):
        assert example.labels is not None
        real = example.labels != IGNORE
        wanted.append([task.labels[int(n)] for n in example.labels[real]])
        given.append([task.labels[int(n)] for n in output[: len(real)][real]])
    return scores.tag(wanted, given)


def batches_of(config: Config, examples: Sequence[Example], tokenizer: Tokenizer, *, weights: Sequence[float] = ()) -> Batches:
    """Examples as this run's batches."""
    special = tokenizer.special
    assert config.task is not None
    return Batches(
        examples,
        kind=config.task.kind,
        family=config.model.family,
        longest=config.sequence,
        pad=special.get("pad", special.get("eos", 0)),
        multiple=math.lcm(8 if config.sequence % 8 == 0 else 1, math.prod(config.sequence_parts.values())),
        weights=weights,
    )
