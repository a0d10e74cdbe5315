"""A flat range of one local shard, as torch.distributed.checkpoint sees it: blocks of the global tensor.

In: a `Cut`, where the range starts, the 1-D tensor that holds it.  Out: an object that DCP writes and reads in place, whatever the
mesh. DCP asks a tensor-like value for its write items, its chunks and a view of each (`_Checkpointable`); DTensor answers the same way,
but cannot say "a flat range of a shard that was cut along its last dim". Long blocks are cut into chunks, so that whoever needs a part
of one reads a part, and nobody needs memory for more than a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megalite.layout import Cut, Rectangle

CHUNK = 1 << 24  # elements; 64 MiB in fp32


class Slice(Tensor):
    """Elements [start, start + length) of the flattened local shard that `cut` describes; shape is the global one."""

    flat: Callable[[], Tensor]
    blocks: dict[torch.Size, tuple[torch.Size, int, int]]  # offsets -> sizes, and the part of `flat` that it is

    @classmethod
    def of(cls, flat: Tensor, *, cut: Cut, start: int) -> Slice:
        """What lies in `flat`; DCP reads it and writes it in place."""
        return cls._make(lambda: flat, cut=cut, start=start, length=flat.numel(), dtype=flat.dtype, device=flat.device)

    @classmethod
    def lazily(cls, read: Callable[[], Tensor], *, cut: Cut) -> Slice:
        """A whole fp32 tensor that is fetched when DCP comes to write it. `read` is called once for every chunk of it."""
        return cls._make(lambda: read().reshape(-1), cut=cut, start=0, length=math.prod(cut.shape), dtype=torch.float32)

    @classmethod
    def _make(cls, flat: Callable[[], Tensor], *, cut: Cut, start: int, length: int, **kind: Any) -> Slice:
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(cut.shape), **kind)
        made.flat = flat
        made.blocks = {
            torch.Size(chunk.offsets): (torch.Size(chunk.sizes), chunk.start - start, chunk.stop - start)
            for block in cut.rectangles(start, start + length)
            for chunk in chunks(block)
        }
        return made

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets, index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=ChunkStorageMetadata(offsets, sizes), properties=properties, size=self.shape),
            )
            for index, (offsets, (sizes, _, _)) in enumerate(self.blocks.items())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, sizes) for offsets, (sizes, _, _) in self.blocks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        sizes, start, stop = self.blocks[index.offset]
        return self.flat()[start:stop].view(sizes)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::detach", "aten::alias"):
            return args[0]
        raise NotImplementedError(f"{func.name()} on a checkpoint slice; it is only written and read")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Slice({tuple(self.shape)}, {len(self.blocks)} blocks)"


def chunks(block: Rectangle, limit: int = CHUNK) -> Iterator[Rectangle]:
    """A block cut along its first dim of more than one row, into parts of at most `limit` elements, or of one row where that is longer."""
    dim = next((dim for dim, size in enumerate(block.sizes) if size > 1), None)
    if dim is None or block.stop - block.start <= limit:
        yield block
        return
    row = math.prod(block.sizes[dim + 1 :])
    step = max(1, limit // row)
    for first in range(0, block.sizes[dim], step):
        num = min(step, block.sizes[dim] - first)
        yield Rectangle(
            offsets=(*block.offsets[:dim], block.offsets[dim] + first, *block.offsets[dim + 1 :]),
            sizes=(*block.sizes[:dim], num, *block.sizes[dim + 1 :]),
            start=block.start + first * row,
            stop=block.start + (first + num) * row,
        )
