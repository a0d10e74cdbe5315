"""What a fine-tuning begins with: the weights of another model as step 0 of its run, and what that model lacks drawn by seed.

In: a checkpoint of ours on whatever mesh, a run folder, or a Hugging Face folder or name.  Out: its settings and tokenizer
(`open_start`), and checkpoints/step-0 (`write_start`), which any mesh loads as it loads every checkpoint. Weights pass through one
tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megalite
from megalite import models
from megalite.checkpoint import manifest, store
from megalite.checkpoint.retention import rank_of, whole
from megalite.checkpoint.slices import Slice
from megalite.checkpoint.storage import Reader
from megalite.config import Config, Model, parse
from megalite.convert import importing
from megalite.convert.files import Weights, locate
from megalite.data.loader import find_tokenizer
from megalite.data.tokenizer import Tokenizer, open_tokenizer
from megalite.errors import UserError
from megalite.layout import Cut


@dataclass(frozen=True)
class Start:
    """A model to begin from. `path`: of a checkpoint of ours, or None; `folder`: of a Hugging Face model, or None."""

    model: Model
    tokenizer: Tokenizer
    tokenizer_source: str
    """Folder or file that opens as the tokenizer."""
    path: Path | None = None
    folder: Path | None = None


def find_checkpoint(source: str) -> Path | None:
    """The checkpoint that is meant: a step-N folder, latest, or of a run folder the newest, and where it was fine-tuned the best; None
    where it is no checkpoint of ours.
    """
    path = Path(source)
    if (path / manifest.FILE).is_file():
        return path.resolve()
    for folder in (path / "checkpoints", path):
        if found := whole(folder):
            return min(found, key=rank_of) if math.isfinite(min(map(rank_of, found))) and _is_tuned(found[-1]) else found[-1]
    return None


def _is_tuned(path: Path) -> bool:
    return store.read_facts(path).get("score") is not None


def open_start(source: str) -> Start:
    """Settings and tokenizer. Raises UserError where the model has none, or no such model exists."""
    path = find_checkpoint(source)
    if path is None:
        folder = locate(source)
        _, model = importing.read_model(folder)
        return Start(model, open_tokenizer(folder), str(folder), folder=folder)
    facts = store.read_facts(path)
    config = parse(facts["config"], source=str(path))
    tokenizer = find_tokenizer(config.data)
    if tokenizer is None:
        raise UserError(f"{path} names no tokenizer; set data.tokenizer in the run it came from, or import the model with one")
    if facts.get("tokenizer") and tokenizer.fingerprint != facts["tokenizer"]:
        raise UserError(
            f"{path} was trained with tokenizer {facts['tokenizer'][:12]}, the one of its data is {tokenizer.fingerprint[:12]}; put it back"
        )
    return Start(config.model, tokenizer, config.data.tokenizer or f"{_prefix(config)}.tokenizer", path=path)


def _prefix(config: Config) -> str:
    from megalite.data.manifest import output_of

    return output_of(config.data.train[0].partition("=")[0])


def write_start(folder: Path, config: Config, start: Start) -> list[str]:
    """checkpoints/step-0 of a run of this config; names of the weights that had to be drawn."""
    model, seed = config.model, config.run.seed
    assert model.vocab is not None
    if start.folder is not None:
        family, _ = importing.read_model(start.folder)
        weights = Weights(start.folder, prefix=family.PREFIX)
        states, drawn = importing.gather(weights, family, model, seed=seed)
    else:
        assert start.path is not None
        states, drawn = _take(Reader(start.path), model, seed=seed)
    facts: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "imported": config.task.start if config.task else None,
        "tokenizer": start.tokenizer.fingerprint,
        "versions": {"megalite": megalite.__version__, "torch": version("torch")},
    }
    store.write_weights(folder, 0, states, facts)
    return drawn


def _take(reader: Reader, model: Model, *, seed: int) -> tuple[dict[str, Slice], list[str]]:
    """Every weight of ours that the checkpoint has, to be read when it is written; a task's head is drawn."""
    known, tied = reader.read_metadata().state_dict_metadata, models.tied(model)
    states: dict[str, Slice] = {}
    drawn: list[str] = []
    kept: dict[str, Tensor] = {}
    for name, parameter in models.build(model, seed=0, device="meta").named_parameters():
        if name in tied:
            continue
        shape, entry = tuple(parameter.shape), known.get(f"weights/{name}")
        there = tuple(entry.size) if entry is not None else None  # type: ignore[union-attr]
        if there == shape:
            make: Callable[[], Tensor] = partial(_read, reader, name, shape)
        elif name.startswith("head."):
            make = partial(models.draw, name, shape, model=model, seed=seed)
            drawn.append(name)
        else:
            raise UserError(f"checkpoint {reader.path}: {name} is {there} there, {shape} here; leave the model's settings as they are")
        states[name] = Slice.lazily(partial(importing.keep_last, kept, name, make), cut=Cut(name, shape))
    return states, drawn


def _read(reader: Reader, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape)
    store.load_weights(reader, {name: tensor})
    return tensor
