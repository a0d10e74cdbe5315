"""`megalite import`: a Hugging Face model becomes a run folder whose checkpoint is step 0; training goes on from it on any mesh.

In: a folder, or a name on the hub, with config.json and safetensors.  Out: OUTPUT/checkpoints/step-0 (weights in fp32; moments begin at 0),
OUTPUT/config.yaml and OUTPUT/tokenizer. Weights pass through one tensor at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import yaml
from torch import Tensor

import megalite
from megalite import models
from megalite.checkpoint import retention, store
from megalite.checkpoint.slices import Slice
from megalite.config import Config, Model, Section
from megalite.convert import bert, gpt2, llama
from megalite.convert.files import Weights, locate
from megalite.convert.mapping import Source
from megalite.data.tokenizer import open_tokenizer
from megalite.errors import UserError
from megalite.layout import Cut

FAMILIES = (gpt2, llama, bert)
OPTIONAL = ("head.pool.", "head.next_sentence.", "head.classify.")  # what a BertForMaskedLM lacks, and a model of no task
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


class Import(Section):
    source: tuple[str, ...] = ()
    """A folder with config.json and safetensors, or a name on the Hugging Face hub."""
    output: str
    """Run folder to make."""
    seed: int = 1234
    """Draws what the source does not have: the next-sentence head of a BertForMaskedLM."""


def import_model(request: Import) -> tuple[Path, list[str]]:
    """Make the run folder; returns the checkpoint and what there is to say about it. Raises UserError for what cannot be imported."""
    if len(request.source) != 1:
        raise UserError("megalite import needs one model: megalite import NAME|FOLDER --output RUN_FOLDER")
    output = Path(request.output)
    if retention.whole(output / "checkpoints"):
        raise UserError(f"--output {output} holds checkpoints already; choose another folder")
    folder = locate(request.source[0])
    family, model = read_model(folder)
    weights = Weights(folder, prefix=family.PREFIX)
    states, drawn = gather(weights, family, model, seed=request.seed)
    tokenizer, fingerprint = copy_tokenizer(folder, output / "tokenizer")
    config = Config.model_validate(
        {
            "name": output.name,
            "run": {"folder": str(output), "seed": request.seed},
            "model": model.model_dump(),
            "data": {"tokenizer": str(tokenizer) if tokenizer else None},
        }
    )
    facts = {
        "config": config.model_dump(mode="json"),
        "imported": request.source[0],
        "tokenizer": fingerprint,
        "versions": {"megalite": megalite.__version__, "torch": version("torch"), "transformers": version("transformers")},
    }
    path = store.write_weights(output / "checkpoints", 0, states, facts)
    (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    said = [f"drawn by seed {request.seed}, since the source has none: {', '.join(drawn)}"] if drawn else []
    if tokenizer is None:
        said.append("no tokenizer came with it; set data.tokenizer")
    return path, said


def read_model(folder: Path) -> tuple[ModuleType, Model]:
    """Which family a folder's config.json describes, and our settings of it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give the folder that transformers' save_pretrained wrote")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as problem:  # whatever transformers raises for a config it does not know
        reason = str(problem).strip().splitlines()[0]
        raise UserError(f"{folder}/config.json cannot be read ({reason}); give a model of transformers") from None
    family = next((family for family in FAMILIES if config.model_type in family.MODEL_TYPES), None)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.MODEL_TYPES)
        raise UserError(f"{folder} is a {config.model_type}, which megalite's models cannot be; it imports {known}")
    return family, family.read_config(config)


def gather(weights: Weights, family: ModuleType, model: Model, *, seed: int) -> tuple[dict[str, Slice], list[str]]:
    """Every weight of ours, to be read when it is written, and which had to be drawn. Shapes are checked now."""
    table, tied = family.table(model), models.tied(model)
    states, drawn = {}, []
    kept: dict[str, Tensor] = {}
    for name, parameter in models.build(model, seed=0, device="meta").named_parameters():
        if name in tied:
            continue
        shape, source = tuple(parameter.shape), table[name]
        if name.startswith(OPTIONAL) and any(weights.find(part) is None for part in source.names):
            drawn.append(name)
            make: Callable[[], Tensor] = partial(models.draw, name, shape, model=model, seed=seed)
        else:
            _check_shapes(weights, source, shape)
            make = partial(source.join, weights.read)
        states[name] = Slice.lazily(partial(keep_last, kept, name, make), cut=Cut(name, shape))
    return states, drawn


def keep_last(kept: dict[str, Tensor], name: str, make: Callable[[], Tensor]) -> Tensor:
    """Made once, however many chunks of it are asked for in a row, and forgotten when the next one is: one tensor is in memory."""
    if name not in kept:
        kept.clear()
        kept[name] = make()
    return kept[name]


def _check_shapes(weights: Weights, source: Source, shape: tuple[int, ...]) -> None:
    for name, wanted, _ in source.parts(shape):
        if weights.find(name) is None:
            weights.read(name)  # says what is missing
        if weights.shape(name) != wanted:
            there = weights.shape(name)
            raise UserError(f"{weights.folder}: {name} is {there}, but config.json makes it {wanted}; they do not belong together")


def copy_tokenizer(source: Path, target: Path) -> tuple[Path | None, str | None]:
    """Keep the tokenizer beside the run; its folder and fingerprint, or None twice where none came along."""
    there = [source / name for name in (*TOKENIZER, "generation_config.json") if (source / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") for path in there):
        return None, None
    target.mkdir(parents=True, exist_ok=True)
    for path in there:
        shutil.copyfile(path, target / path.name)
    if not any((target / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        shutil.copyfile(source / "config.json", target / "config.json")  # by it transformers knows whose vocabulary this is
    return target, open_tokenizer(target).fingerprint
