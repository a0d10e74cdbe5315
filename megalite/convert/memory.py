"""A checkpoint as a transformers model in this process, without a folder between: what generates, embeds and is examined on one device.

In: a checkpoint of ours, or a Hugging Face folder or name.  Out: the model in evaluation mode, and both tokenizers, ours and transformers'.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.storage import Reader
from megalite.checkpoint.store import read_facts
from megalite.config import Config, parse
from megalite.convert.exporting import describe, family_of, plan
from megalite.convert.starting import open_start
from megalite.data.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """`config`: of the run it comes from, None for a Hugging Face model. `longest`: tokens it can read."""

    model: Any
    tokenizer: Tokenizer
    theirs: Any
    """The same tokenizer as transformers has it."""
    family: str
    longest: int
    folder: str
    """Of the tokenizer."""
    config: Config | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device


def load(source: str, *, dtype: str = "fp32") -> Loaded:
    """Open it on the GPU where there is one. Raises UserError for what has no counterpart in transformers."""
    import transformers
    from transformers import AutoTokenizer

    start = open_start(source)
    config = None
    if start.path is not None:
        config = parse(read_facts(start.path)["config"], source=str(start.path))
        settings = describe(family_of(config.model), config, start.tokenizer, dtype="fp32")
        model = getattr(transformers, settings.architectures[0])(settings)
        weights = {entry.name: entry.make() for entry in plan(Reader(start.path), family_of(config.model), config.model)}
        missing, unknown = model.load_state_dict(weights, strict=False)
        model.tie_weights()
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        assert not unknown and set(missing) <= tied, (missing, unknown)
    else:
        assert start.folder is not None
        kind = {"bert": transformers.AutoModelForPreTraining}.get(start.model.family, transformers.AutoModelForCausalLM)
        model = kind.from_pretrained(start.folder)
    with tempfile.TemporaryDirectory() as folder:
        if not (Path(start.tokenizer_source) / "tokenizer_config.json").is_file():
            start.tokenizer.save(folder)
        theirs = AutoTokenizer.from_pretrained(folder if any(Path(folder).iterdir()) else start.tokenizer_source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device: Any = model
    on_device = on_device.to(device, DTYPES[dtype]).eval()
    return Loaded(on_device, start.tokenizer, theirs, start.model.family, start.model.sequence, start.tokenizer_source, config)


def streamer(loaded: Loaded) -> Any:
    """Prints tokens as transformers' `generate` makes them."""
    from transformers import TextStreamer

    return TextStreamer(loaded.theirs, skip_prompt=True, skip_special_tokens=True)
