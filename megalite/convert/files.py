"""A Hugging Face model's folder: safetensors shards read tensor by tensor, and written so that no more than one tensor is in memory.

In: a folder, or a name on the Hugging Face hub.  Out: tensors by name; a folder that transformers opens. Format:
https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megalite.errors import UserError

SHARD = 4 << 30  # bytes
TYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16")}
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(source: str) -> Path:
    """The folder itself, or that of a model downloaded from the hub."""
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist; give a folder with config.json and safetensors, or a name on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=WANTED))
    except Exception as problem:  # of the network, of the hub, of the name: its library has no common ancestor for them
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(f"{source} is no folder, and the Hugging Face hub gives no model of that name ({reason}); give a folder") from None


class Weights:
    """The tensors of a folder, by name; each is read when it is asked for."""

    def __init__(self, folder: Path, *, prefix: str) -> None:
        """`prefix` is what a name begins with where the model has its head, and what a bare trunk leaves out."""
        self.folder, self.prefix = folder, prefix
        index = folder / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self.files: dict[str, Any] = {}
        for name in names:
            try:
                opened = safe_open(folder / name, framework="pt")
                self.files |= dict.fromkeys(opened.keys(), opened)
            except Exception as problem:  # the library's own exception derives from Exception alone
                raise UserError(
                    f"{folder / name} cannot be read ({' '.join(str(problem).split())}); "
                    "a model is imported from safetensors, as transformers' save_pretrained writes them"
                ) from None

    def find(self, name: str) -> str | None:
        """The name under which this tensor lies here, or None: also without the prefix, and a norm's under TensorFlow's names."""
        bare = name.removeprefix(self.prefix)
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        ending = next((ending for ending in old if name.endswith(ending)), None)
        tried = [name, bare]
        if ending:
            tried += [each.removesuffix(ending) + old[ending] for each in (name, bare)]
        return next((each for each in tried if each in self.files), None)

    def read(self, name: str) -> Tensor:
        """In fp32. Raises UserError for a name that is missing."""
        found = self.find(name)
        if found is None:
            raise UserError(f"{self.folder} holds no {name}; it is no whole model of that architecture")
        return self.files[found].get_tensor(found).float()

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading it."""
        found = self.find(name)
        assert found is not None, name
        return tuple(self.files[found].get_slice(found).get_shape())


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its shape is known before it is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_weights(folder: Path, entries: Sequence[Entry], *, dtype: str, limit: int = SHARD) -> None:
    """Write entries in safetensors of about `limit` bytes, in their order, and the index where there are several."""
    width = TYPES[dtype][0].itemsize
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = math.prod(entry.shape) * width
        if shards[-1] and filled + size > limit:
            shards, filled = [*shards, []], 0
        shards[-1].append(entry)
        filled += size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, dtype=dtype)
    if len(shards) > 1:
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(math.prod(entry.shape) * width for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, entries: Sequence[Entry], *, dtype: str) -> None:
    kind, name = TYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        size = math.prod(entry.shape) * kind.itemsize
        header[entry.name] = {"dtype": name, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make().to(kind).contiguous()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}"
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
