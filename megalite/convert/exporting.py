"""`megalite export`: a checkpoint becomes a Hugging Face model that AutoModel, vLLM and lm-eval open as it is.

In: a checkpoint, written on whatever mesh.  Out: a folder with safetensors, config.json, generation_config.json and the tokenizer. Weights
pass through one tensor at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from megalite import models
from megalite.checkpoint import store
from megalite.checkpoint.storage import Reader, sync
from megalite.config import Config, Model, Section, parse
from megalite.convert.files import Entry, write_weights
from megalite.convert.importing import FAMILIES, TOKENIZER
from megalite.data.loader import find_tokenizer
from megalite.data.tokenizer import Tokenizer, open_tokenizer
from megalite.errors import UserError


class Export(Section):
    checkpoint: tuple[str, ...] = ()
    """runs/NAME/checkpoints/latest or a step-N folder."""
    output: str
    """Folder to make."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the exported weights; the checkpoint's are fp32."""
    tokenizer: str | None = None
    """Tokenizer file, folder or name; left out: the one the model was trained with."""


def export_model(request: Export) -> list[str]:
    """Make the folder; returns what there is to say about it. Raises UserError for what has no counterpart in transformers."""
    if len(request.checkpoint) != 1:
        raise UserError("megalite export needs one checkpoint: megalite export runs/NAME/checkpoints/latest --output FOLDER")
    path, output = Path(request.checkpoint[0]), Path(request.output)
    facts = store.read_facts(path)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; choose another folder")
    config = parse(facts["config"], source=str(path))
    family = family_of(config.model)
    tokenizer = choose_tokenizer(request, config, facts.get("tokenizer"))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(partial, plan(Reader(path), family, config.model), dtype=request.dtype)
    write_config(partial, family, config, tokenizer, dtype=request.dtype)
    save_tokenizer(partial, request, config, tokenizer)
    sync(partial)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return [] if tokenizer else ["no tokenizer was found beside the shards; give --tokenizer to export one with it"]


def family_of(model: Model) -> ModuleType:
    """Which model of transformers this is."""
    family = next((family for family in FAMILIES if family.fits(model)), None)
    if family is None:
        said = ", ".join(
            f"{name} = {getattr(model, name)}" for name in ("family", "positions", "norm", "activation", "bias", "qkv_bias", "kv_heads")
        )
        raise UserError(
            f"no model of transformers is a model with {said}; it has GPT-2 (learned, layer, GELU, biases, as many kv_heads), "
            "Llama and Qwen2 (rope, rms, swiglu) and BERT (gelu)"
        )
    return family


def plan(reader: Reader, family: ModuleType, model: Model) -> list[Entry]:
    """Every tensor of theirs, in the order of ours, made when it is written."""
    whole, tied, read = models.build(model, seed=0, device="meta"), models.tied(model), _keep_last(reader)
    entries, table = [], family.table(model)
    for name, parameter in whole.named_parameters():
        if name not in tied:
            shape = tuple(parameter.shape)
            for theirs, their_shape, take in table[name].parts(shape):
                entries.append(Entry(theirs, their_shape, _maker(read, name, shape, take)))
    return entries


def _maker(
    read: Callable[[str, tuple[int, ...]], Tensor], name: str, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    return lambda: take(read(name, shape))


def _keep_last(reader: Reader) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Read a weight of the checkpoint, and keep it until another one is asked for."""
    kept: dict[str, Tensor] = {}

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in kept:
            kept.clear()
            tensor = torch.empty(shape)
            store.load_weights(reader, {name: tensor})
            kept[name] = tensor
        return kept[name]

    return read


def write_config(folder: Path, family: ModuleType, config: Config, tokenizer: Tokenizer | None, *, dtype: str) -> None:
    """config.json, and generation_config.json for a model that generates."""
    from transformers import GenerationConfig

    described = describe(family, config, tokenizer, dtype=dtype)
    described.save_pretrained(folder)
    if config.model.family == "gpt" and config.model.head == "pretrain":
        GenerationConfig.from_model_config(described).save_pretrained(folder)


def describe(family: ModuleType, config: Config, tokenizer: Tokenizer | None, *, dtype: str) -> Any:
    """The settings as transformers has them."""
    from transformers import AutoConfig

    model, task, special = config.model, config.task, tokenizer.special if tokenizer else {}
    settings: dict[str, Any] = {
        **family.write_config(model),
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
        "bos_token_id": special.get("bos", special.get("eos")),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("pad", special.get("eos") if model.head != "pretrain" else None),
    }
    if model.head != "pretrain":
        names = task.labels if task and task.labels else tuple(f"LABEL_{number}" for number in range(model.labels))
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        settings["problem_type"] = {"classify": "single_label_classification", "regress": "regression"}.get(model.head)
    described = AutoConfig.for_model(settings.pop("model_type"), **settings)
    described.architectures = [family.architecture(model)]
    described.dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    return described


def choose_tokenizer(request: Export, config: Config, fingerprint: str | None) -> Tokenizer | None:
    """The tokenizer asked for, or the one the model was trained with, whose fingerprint must be the checkpoint's."""
    tokenizer = open_tokenizer(request.tokenizer) if request.tokenizer else find_tokenizer(config.data)
    if tokenizer and fingerprint and tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"the model was trained with tokenizer {fingerprint[:12]}, {request.tokenizer or 'the one beside its shards'} is "
            f"{tokenizer.fingerprint[:12]}; give --tokenizer the right one"
        )
    if tokenizer and config.model.vocab and tokenizer.vocab_size > config.model.vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model.vocab}; give --tokenizer the right one")
    return tokenizer


def save_tokenizer(folder: Path, request: Export, config: Config, tokenizer: Tokenizer | None) -> None:
    """As it came from Hugging Face, file by file, or as we write one."""
    if tokenizer is None:
        return
    named = request.tokenizer or config.data.tokenizer
    if named and Path(named).is_dir():
        for path in (Path(named) / name for name in (*TOKENIZER, "generation_config.json")):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    else:
        tokenizer.save(folder)
