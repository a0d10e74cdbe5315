"""Which slice of which global tensor a rank holds: written by `parallel/`, read by checkpoints, the norm and the converters.

A `Cut` says how tensor parallelism cuts one parameter; `rectangles` says which blocks of the global tensor a flat range of the
local shard is made of (ZeRO owns flat ranges), which is what lets a checkpoint be written and read on any mesh.
Plain arithmetic: no process group, no device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def split(size: int, num: int) -> list[int]:
    """Sizes of `num` consecutive parts of `size`; the first `size % num` parts are one longer."""
    return [size // num + (index < size % num) for index in range(num)]


class Rectangle(NamedTuple):
    """A block of the global tensor, and the flat range of the local shard that holds it (row-major)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Cut:
    """How one parameter lies on the tensor-parallel axis.

    `parts` are the sections along `dim` that are cut one by one: a fused query-key-value weight (3 sections) keeps whole heads
    of each on every rank. `dim` None: every rank holds the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[int, ...] = ()
    index: int = 0
    num: int = 1

    def __post_init__(self) -> None:
        if self.dim is not None:
            object.__setattr__(self, "parts", self.parts or (self.shape[self.dim],))
            assert sum(self.parts) == self.shape[self.dim], f"{self.name}: sections {self.parts} do not add up to {self.shape[self.dim]}"

    @property
    def layer(self) -> str:
        """Which layer of the model it belongs to: "embed", "layers.17"."""
        first, second, *_ = self.name.split(".")
        return f"{first}.{second}" if second.isdigit() else first

    @property
    def whole(self) -> bool:
        return self.dim is None or self.num == 1

    def sections(self) -> list[tuple[int, int]]:
        """(offset, size) along `dim` in the global tensor, section by section, in the order of the local shard."""
        found, base = [], 0
        for part in self.parts:
            sizes = split(part, self.num)
            found.append((base + sum(sizes[: self.index]), sizes[self.index]))
            base += part
        return found

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        local = sum(size for _, size in self.sections())
        return (*self.shape[: self.dim], local, *self.shape[self.dim + 1 :])

    def take(self, full: Tensor) -> Tensor:
        """This rank's shard of the global tensor `full`; a view where the whole tensor is meant."""
        if self.whole:
            return full
        assert self.dim is not None
        return torch.cat([full.narrow(self.dim, offset, size) for offset, size in self.sections()], dim=self.dim)

    def put(self, local: Tensor, full: Tensor) -> None:
        """Write this rank's shard into its place in the global tensor."""
        if self.dim is None:
            full.copy_(local)
            return
        base = 0
        for offset, size in self.sections():
            full.narrow(self.dim, offset, size).copy_(local.narrow(self.dim, base, size))
            base += size

    def rectangles(self, start: int, stop: int) -> list[Rectangle]:
        """The blocks of the global tensor that elements [start, stop) of the flattened local shard are, in the order of the shard."""
        if self.whole:
            return list(_blocks(self.shape, start, stop))
        found = [piece for block in _blocks(self.local_shape, start, stop) for piece in self._globalise(block)]
        return sorted(found, key=lambda piece: piece.start)

    def _globalise(self, block: Rectangle) -> Iterator[Rectangle]:
        """Move a block of the local shard to its global place, cutting it where it crosses a section."""
        assert self.dim is not None
        base = 0
        low, high = block.offsets[self.dim], block.offsets[self.dim] + block.sizes[self.dim]
        for offset, size in self.sections():
            first, last = max(low, base), min(high, base + size)
            if first < last:
                yield from self._section(block, first - low, last - first, offset + first - base)
            base += size

    def _section(self, block: Rectangle, skip: int, size: int, offset: int) -> Iterator[Rectangle]:
        dim = self.dim
        assert dim is not None
        if skip == 0 and size == block.sizes[dim]:
            yield block._replace(offsets=(*block.offsets[:dim], offset, *block.offsets[dim + 1 :]))
            return
        # A part of the rows along dim is contiguous only below each combination of the outer indices.
        inner = math.prod(block.sizes[dim + 1 :])
        for number, outer in enumerate(itertools.product(*(range(n) for n in block.sizes[:dim]))):
            start = block.start + (number * block.sizes[dim] + skip) * inner
            yield Rectangle(
                offsets=(*(o + i for o, i in zip(block.offsets[:dim], outer, strict=True)), offset, *block.offsets[dim + 1 :]),
                sizes=(*(1 for _ in outer), size, *block.sizes[dim + 1 :]),
                start=start,
                stop=start + size * inner,
            )


def _blocks(shape: tuple[int, ...], start: int, stop: int, prefix: tuple[int, ...] = (), base: int = 0) -> Iterator[Rectangle]:
    """A flat row-major range as at most 2n - 1 boxes: a ragged head, whole rows, a ragged tail, each along every dim."""
    if start >= stop:
        return
    if not shape:
        yield Rectangle((), (), base + start, base + stop)
        return
    if len(shape) == 1:
        yield Rectangle((*prefix, start), (*(1 for _ in prefix), stop - start), base + start, base + stop)
        return
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from _blocks(shape[1:], head, tail, (*prefix, first), base + first * inner)
        return
    if head:
        yield from _blocks(shape[1:], head, inner, (*prefix, first), base + first * inner)
        first += 1
    if last > first:
        sizes = (*(1 for _ in prefix), last - first, *shape[1:])
        yield Rectangle((*prefix, first, *(0 for _ in shape[1:])), sizes, base + first * inner, base + last * inner)
    if tail:
        yield from _blocks(shape[1:], 0, tail, (*prefix, last), base + last * inner)
