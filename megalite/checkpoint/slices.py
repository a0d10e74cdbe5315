"""A flat range of one local shard, as torch.distributed.checkpoint sees it: blocks of the global tensor.

In: a `Cut`, where the range starts, the 1-D tensor that holds it.  Out: an object that DCP writes and reads in place, whatever the
mesh. DCP asks a tensor-like value for its write items, its chunks and a view of each (`_Checkpointable`); DTensor answers the same way,
but cannot say "a flat range of a shard that was cut along its last dim".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megalite.layout import Cut


class Slice(Tensor):
    """Elements [start, start + flat.numel()) of the flattened local shard that `cut` describes; shape is the global one."""

    flat: Tensor
    blocks: list[tuple[torch.Size, torch.Size, int, int]]

    @classmethod
    def of(cls, flat: Tensor, *, cut: Cut, start: int) -> Slice:
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(cut.shape), dtype=flat.dtype, device=flat.device)
        made.flat = flat
        made.blocks = [
            (torch.Size(block.offsets), torch.Size(block.sizes), block.start - start, block.stop - start)
            for block in cut.rectangles(start, start + flat.numel())
        ]
        return made

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets, index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=ChunkStorageMetadata(offsets, sizes), properties=properties, size=self.shape),
            )
            for index, (offsets, sizes, _, _) in enumerate(self.blocks)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, sizes) for offsets, sizes, _, _ in self.blocks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offsets, sizes, start, stop in self.blocks:
            if offsets == index.offset:
                return self.flat[start:stop].view(sizes)
        raise KeyError(index)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::detach", "aten::alias"):
            return args[0]
        raise NotImplementedError(f"{func.name()} on a checkpoint slice; it is only written and read")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Slice({tuple(self.shape)}, {len(self.blocks)} blocks)"
