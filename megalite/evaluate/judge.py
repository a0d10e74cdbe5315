"""`megalite evaluate`: what a model is worth on held-out text or rows, on one device or on any mesh.

In: a checkpoint, a run folder or a Hugging Face model, and data.  Out: scores on the console, as JSON and as Markdown. A fine-tuned
model is judged by
the scores of its task, on rows; any other GPT by perplexity and bits a byte, on text or shards; a BERT by its loss on masked tokens of
shards. Translations are also written, greedily, on one device, for BLEU and chrF.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from megalite import launch
from megalite.checkpoint.store import Store, read_facts
from megalite.config import Config, Section, merge, parse
from megalite.convert.starting import Start, open_start, write_start
from megalite.data.documents import BadLine, documents
from megalite.data.examples import GENERATING, IGNORE, Example, Examples, columns_of
from megalite.data.inputs import Reading, cut, find_files
from megalite.data.lessons import encode
from megalite.data.loader import open_valid
from megalite.data.rows import Faults, read_rows
from megalite.data.shards import Shard
from megalite.data.tokenizer import Tokenizer, open_tokenizer
from megalite.errors import UserError
from megalite.evaluate import scores
from megalite.fit import resolve_mesh
from megalite.log import open_voice, quiet_foreign
from megalite.task import Task

CHUNK = 1 << 16  # tokens decoded at once, to count the bytes of a shard


class Evaluation(Section):
    model: tuple[str, ...] = ()
    """A checkpoint, a run folder (its best, where it was fine-tuned), or a Hugging Face folder or name."""
    data: tuple[str, ...] = ()
    """Rows for a fine-tuned model; shards (PREFIX) or text for any other: files, folders, hf:NAME[:CONFIG][:SPLIT]."""
    columns: tuple[str, ...] = ()
    """Columns of the rows, as in `megalite finetune`; left out: those it was trained with."""
    text_key: str = "text"
    """Field of jsonl, column of parquet, that holds the text."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to measure instead, on one device."""
    harness_tasks: str | None = None
    """Folder with task files of one's own for it."""
    limit: PositiveInt | None = None
    """Most documents of each of these tasks."""
    shots: NonNegativeInt | None = None
    """Examples in front of each question; left out: the task's own number."""
    output: str | None = None
    """Beginning of the names of the files to write; left out: RUN_FOLDER/evaluation."""


@dataclass(frozen=True)
class Matter:
    """What is judged: examples, and for text its bytes; masked: shards of a BERT."""

    examples: Examples | None
    size: int = 0
    masked: bool = False


def evaluate(request: Evaluation, overrides: dict[str, Any]) -> list[str]:
    """Judge, write the files; what there is to say. `overrides`: settings of the mesh and its batches."""
    if len(request.model) != 1:
        raise UserError("megalite evaluate needs one model: megalite evaluate runs/NAME --data FILE")
    if not request.data and not request.harness:
        raise UserError("megalite evaluate needs --data FILE, or --harness TASK")
    request.require(limit="harness", shots="harness", harness_tasks="harness")
    if request.harness:
        request.refuse("--harness, which has tasks of its own", but=("model", "harness", "harness_tasks", "limit", "shots", "output"))
    quiet_foreign()
    start = open_start(request.model[0])
    if request.harness:
        return _measure(request, start, overrides)
    config = settle(start, overrides)
    config, matter = _matter(config, start, request)
    config = resolve_mesh(config, launch.count_ranks(config))
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": f"{folder}/run"})})
        path = start.path
        if path is None:
            write_start(Path(folder) / "start", config, start)
            path = Path(folder) / "start/step-0"
        found = launch.start(config, functools.partial(_judge, path=path, matter=matter), warm=("megalite.train",))
    if not launch.is_rank_zero():
        return []
    if config.task and config.task.kind == "translate":
        found |= translate(request.model[0], matter)
    return _write(found, config, request, start)


def _measure(request: Evaluation, start: Start, overrides: dict[str, Any]) -> list[str]:
    """By lm-evaluation-harness."""
    from megalite.evaluate.harness import measure

    if not launch.stands_alone():
        raise UserError("--harness measures on one device; start one process: srun --ntasks 1")
    if overrides:
        raise UserError("--harness measures on one device; leave settings of the mesh out")
    found = measure(request.model[0], request.harness, folder=request.harness_tasks, limit=request.limit, shots=request.shots)
    flat = {f"{task} {name.removesuffix(',none')}": value for task, values in found.items() for name, value in values.items()}
    return _write(flat, Config(), request, start)


def settle(start: Start, overrides: dict[str, Any]) -> Config:
    """The run's config, on one device unless the flags say otherwise."""
    document: dict[str, Any] = {"model": start.model.model_dump(mode="json"), "data": {"tokenizer": start.tokenizer_source}}
    if start.path is not None:
        document = dict(read_facts(start.path)["config"])
        document["data"] = {**document["data"], "tokenizer": start.tokenizer_source}
    document |= {"mesh": {}, "deepspeed": None, "train": {"precision": "fp32", "micro_batch": 8}}
    document["model"] |= {"dropout": 0.0, "attention_dropout": 0.0}
    unknown = [section for section in overrides if section not in ("mesh", "train", "deepspeed", "data")]
    if unknown:
        raise UserError(f"--{unknown[0]}... is no flag of megalite evaluate; it takes --mesh, --train, --data.sequence and --deepspeed")
    merged = merge(document, overrides)
    config = parse(merged, source="megalite evaluate")
    if "global_batch" not in overrides.get("train", {}):
        size = config.train.micro_batch * config.mesh.pp * (config.mesh.dp or max(1, launch.count_ranks(config) // config.mesh.world))
        config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": size})})
    return config


def _matter(config: Config, start: Start, request: Evaluation) -> tuple[Config, Matter]:
    """Examples, and the config with the length that they need."""
    limit = config.data.sequence or config.model.sequence
    family = config.model.family
    read = "columns" if config.task is not None else "text_key"
    request.refuse("a fine-tuned model" if config.task else "a model of no task", but=("model", "data", "output", read))
    if config.task is not None:
        task = config.task.model_copy(update={"columns": request.columns or config.task.columns})
        faults = Faults(refuse=False)
        rows = list(read_rows(request.data, columns_of(task), faults))
        held = encode(rows, task, start.tokenizer, family=family, limit=limit, folder=start.tokenizer_source, faults=faults)
        predicted = [example.labels[example.labels != IGNORE] for example in held.found if example.labels is not None]
        size = _bytes(np.concatenate(predicted), start.tokenizer) if task.kind == "lm" else 0
        return config.model_copy(update={"task": task}), Matter(held, size)
    if family == "bert":
        if len(request.data) != 1 or not Path(f"{request.data[0]}.idx").is_file():
            raise UserError("a BERT that was not fine-tuned is judged on shards: give --data PREFIX of one that `megalite prepare` wrote")
        data = config.data.model_copy(update={"train": (), "valid": request.data[0]})
        return config.model_copy(update={"data": data}), Matter(None, masked=True)
    ids, size = _read_text(request, start.tokenizer)
    found = [Example(ids[at : at + limit], ids[at + 1 : at + limit + 1]) for at in range(0, len(ids) - 1, limit)]
    found = [Example(e.ids[: len(e.labels)], e.labels) for e in found if e.labels is not None]
    config = config.model_copy(update={"task": Task(kind="lm", start=request.model[0], train=request.data)})
    return config, Matter(Examples(found), size)


def _read_text(request: Evaluation, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All tokens in a row, every document ended, and the bytes of text that are predicted: all but the first token's."""
    parts: list[np.ndarray] = []
    size = 0
    eos = tokenizer.special.get("eos")
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token; perplexity is that of a GPT's text")
    for name in request.data:
        if Path(f"{name}.idx").is_file():
            shard = Shard(name)
            for at in range(0, shard.num_tokens, CHUNK):
                parts.append(shard.tokens(at, at + CHUNK).astype(np.int64))
            size += sum(_bytes(shard.sequence(number), tokenizer) for number in range(shard.num_sequences))
            continue
        for piece in cut(find_files([name]), Reading(request.text_key)):
            for document in documents(piece, Reading(request.text_key)):
                if isinstance(document, BadLine):
                    raise UserError(f"{document.where}: {document.why}; mend it")
                if document.text:
                    parts += [tokenizer.encode_batch([document.text])[0].astype(np.int64), np.array([eos])]
                    size += len(document.text.encode())
    ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(ids) < 2:
        raise UserError(f"{' '.join(request.data)} holds {len(ids)} tokens; there is nothing to judge by")
    return ids, size - _bytes(ids[:1], tokenizer)


def _bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """Of the text that these tokens are; special ones are none."""
    return len(tokenizer.decode(ids[~tokenizer.reserved[ids]]).encode())


def _judge(config: Config, rank: int, *, path: Path, matter: Matter) -> dict[str, Any]:
    """What every rank does."""
    from megalite import models
    from megalite.data.grouped import Once
    from megalite.data.loader import Loader
    from megalite.ds_config import read_document
    from megalite.engine import Engine, start_mesh
    from megalite.evaluate.examine import batches_of, examine
    from megalite.evaluate.validate import validate

    quiet_foreign()
    open_voice(rank, own_log=True)
    mesh = start_mesh(config, rank)
    engine = Engine(config, mesh, document=read_document(config))
    with Store(Path(str(config.run.folder)), config.checkpoint, tied=models.tied(config.model)) as store:
        store.load(path, engine.zero.pieces(), weights_only=True)
    engine.restore(0, {})
    sizes = {"global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch, "dp": mesh.dp, "dp_rank": mesh.dp_rank}
    if matter.masked:
        opened = open_valid(config.data, model=config.model)
        assert opened is not None
        number = -(-len(opened.source) // config.train.global_batch)  # type: ignore[arg-type]
        with Loader(opened.source, **sizes) as loader:
            parts = validate(engine, loader, batches=number)
        return {**parts, "masked_perplexity": math.exp(min(parts["tokens"], 700.0))}
    assert matter.examples is not None and config.task is not None
    once = Once(
        batches_of(config, matter.examples.found, open_tokenizer(str(config.data.tokenizer))), global_batch=config.train.global_batch
    )
    with Loader(once, **sizes) as loader:
        found = examine(engine, once, loader, task=config.task)
    if config.task.kind in GENERATING:
        targets = sum(int((example.labels != -100).sum()) for example in matter.examples.found if example.labels is not None)
        if matter.size:
            return scores.language(found["loss"] * targets, targets, matter.size)
        found["tokens"] = targets
    return found


def translate(model: str, matter: Matter) -> dict[str, Any]:
    """BLEU and chrF of greedy translations."""
    from megalite.convert.memory import load
    from megalite.evaluate.text import Generation, write

    assert matter.examples is not None
    pairs = [example.source for example in matter.examples.found]
    loaded = load(model)
    assert loaded.config is not None and loaded.config.task is not None
    prompts = [loaded.tokenizer.encode_batch([loaded.config.task.prompt.format(source=source)])[0].tolist() for source, _ in pairs]
    answers = [int((example.labels != -100).sum()) for example in matter.examples.found if example.labels is not None]
    longest = min(2 * max(answers) + 8, loaded.longest // 2)
    given = write(loaded, prompts, Generation(temperature=0, tokens=longest, batch=16))
    return scores.translate([target for _, target in pairs], [answer.strip() for (answer,) in given])


def _write(found: dict[str, Any], config: Config, request: Evaluation, start: Start) -> list[str]:
    """The files, and the same as lines."""
    beside = start.path.parent.parent if start.path is not None else Path()
    output = Path(request.output or beside / "evaluation")
    labels: Sequence[str] = config.task.labels if config.task else ()
    body = {"model": str(start.path or start.folder), "data": request.data, "labels": labels, "mesh": config.mesh.model_dump(), **found}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(output.name + ".json").write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")
        page = f"# {body['model']}\n\non {' '.join(request.data)}\n\n{scores.as_markdown(found, labels)}"
        output.with_name(output.name + ".md").write_text(page, "utf-8")
    except OSError as problem:
        raise UserError(f"--output {output} cannot be written ({problem.strerror}); choose another place") from None
    shown = [
        f"{name:<18} {value:,.4f}" if isinstance(value, float) else f"{name:<18} {value}"
        for name, value in found.items()
        if name != "confusion"
    ]
    return [*shown, f"written            {output}.json, {output}.md"]
