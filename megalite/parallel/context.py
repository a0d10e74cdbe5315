"""Context parallelism: every rank of the axis holds a part of every sequence, and in attention all of it for a part of the heads.

In: the module that attends, queries, keys and values cut along the sequence.  Out: the same, as if nothing were cut. Two all-to-alls
around attention (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509) move 4 s d / cp numbers a rank, however long the sequence; every
rank sees whole sequences there, so masks, rotations and kernels are those of one process and causal work is even.
Memory for activations falls with cp, attention's too; cp x tp cannot exceed the number of query heads.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.mesh import Mesh
from megalite.parallel import collectives

Batch = dict[str, Tensor]


class Ulysses(nn.Module):
    """`plain(q, k, v, batch)` on whole sequences, between sequences cut over `group`: (b, s / cp, h, k) -> (b, s / cp, h, k)."""

    def __init__(self, plain: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.plain, self.group, self.num = plain, group, group.size()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        # fewer key heads than ranks: repeat each until they can be shared out, always to ranks that have its queries
        repeats = self.num // math.gcd(self.num, k.shape[2])
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        heads = [x.unflatten(2, (self.num, -1)) for x in (q, k, v)]  # (b, s / cp, cp, h / cp, k)
        together = torch.cat(heads, dim=3).flatten(2, 3)  # one all-to-all instead of three
        mine = collectives.exchange(together, self.group, split=2, join=1)  # (b, s, (h + 2 g) / cp, k)
        q, k, v = mine.split([x.shape[3] for x in heads], dim=2)
        return collectives.exchange(self.plain(q, k, v, batch), self.group, split=1, join=2)


def share(batch: Batch, mesh: Mesh, *, tokens: tuple[str, ...], hidden: tuple[str, ...], sequence_parallel: bool) -> Batch:
    """This rank's part of a microbatch along the sequence: `tokens` are cut over cp, `hidden` as the hidden state is, over tp too."""

    def part(name: str, value: Tensor) -> Tensor:
        if name in tokens or (name in hidden and not sequence_parallel):
            return value.chunk(mesh.cp, dim=1)[mesh.cp_rank]
        if name in hidden:
            return value.chunk(mesh.cp * mesh.tp, dim=1)[mesh.cp_rank * mesh.tp + mesh.tp_rank]
        return value

    return {name: part(name, value) for name, value in batch.items()}
