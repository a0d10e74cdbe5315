"""What a tensor of ours is made of in a Hugging Face model: named tensors, stacked along the output, perhaps transposed.

In: a table from our names to `Source`s, as gpt2, llama and bert give it.  Out: our tensor from theirs, and theirs from ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.config import Model
from megalite.errors import UserError


@dataclass(frozen=True)
class Source:
    """Our tensor is theirs called `names`, one below the other along dim 0; `sizes` are their rows, where there are several."""

    names: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    """Theirs is (in, out), as GPT-2's Conv1D holds it."""

    def join(self, get: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, from theirs."""
        parts = [get(name).T if self.transposed else get(name) for name in self.names]
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    def parts(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]]:
        """Name and shape of each of theirs, and how to take it out of our tensor, which has this shape."""
        start = 0
        for name, size in zip(self.names, self.sizes or (shape[0],), strict=True):
            rows = (size, *shape[1:])
            yield name, rows[::-1] if self.transposed else rows, _taker(start, size, self.transposed)
            start += size
        assert start == shape[0], f"{self.names} have {start} rows of {shape[0]}"


def _taker(start: int, size: int, transposed: bool) -> Callable[[Tensor], Tensor]:
    def take(ours: Tensor) -> Tensor:
        part = ours.narrow(0, start, size)
        return part.T if transposed else part

    return take


Table = dict[str, Source]


def ending(model: Model, *, pretrained: str) -> str:
    """What transformers calls a model of this head, behind the family's name."""
    sequence = "ForSequenceClassification"
    return {"pretrain": pretrained, "classify": sequence, "regress": sequence, "tag": "ForTokenClassification"}[model.head]


def both(ours: str, theirs: str | tuple[str, ...], *, sizes: tuple[int, ...] = (), transposed: bool = False, bias: bool = True) -> Table:
    """The entries of a module's weight and bias. Only a matrix is transposed."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    table = {f"{ours}.weight": Source(tuple(f"{name}.weight" for name in names), sizes, transposed)}
    if bias:
        table[f"{ours}.bias"] = Source(tuple(f"{name}.bias" for name in names), sizes)
    return table


def require(config: Any, **allowed: Any) -> None:
    """Raises UserError for a setting of a Hugging Face config that our models do not have; a value or a tuple of values is allowed."""
    for key, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        value = getattr(config, key, None)
        if value not in values:
            wanted = " or ".join(map(repr, values))
            raise UserError(f"{config.model_type}: {key} = {value!r}, but megalite's model has {wanted}; such a model cannot be imported")
