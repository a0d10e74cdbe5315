"""The ranks as a dp x pp x cp x tp grid: one value, built once, passed as an argument.

In: the degrees and, when ranks run, an initialised torch.distributed.  Out: this rank's coordinates and one process group
an axis, by name. Rank order is `arange(world).view(dp, pp, cp, tp)`: tensor-parallel neighbours are neighbours in rank, so they share a
node; context-parallel ones come next, replicas of data parallelism lie farthest apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

AXES = ("dp", "pp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Degrees and this rank's place; `groups` is filled by `Mesh.start` and stays empty in plain arithmetic."""

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.pp * self.cp * self.tp)

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.cp * self.tp) % self.pp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    def grid(self) -> torch.Tensor:
        """Ranks as (dp, pp, cp, tp)."""
        return torch.arange(self.world).view(self.dp, self.pp, self.cp, self.tp)

    @property
    def num_copies(self) -> int:
        """Ranks that hold the same weights before ZeRO shards them."""
        return self.dp * self.cp

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def lines(self, *axes: str) -> list[list[int]]:
        """Every group of ranks that differ only along `axes`, each in rank order; together they cover the world once."""
        kept = [AXES.index(axis) for axis in axes]
        fixed = [dim for dim in range(len(AXES)) if dim not in kept]
        size = torch.tensor(self.grid().shape)[kept].prod().item()
        return self.grid().permute(*fixed, *kept).reshape(-1, int(size)).tolist()

    @classmethod
    def start(cls, *, dp: int, pp: int, tp: int, device: torch.device, cp: int = 1) -> Mesh:
        """The mesh of a running torch.distributed world. Every rank must call it, with the same degrees.

        Groups: dp, pp, cp, tp, one each; `copies` (dp and cp together: ranks that hold the same weights, over which ZeRO shards them);
        `ends` (first and last stage, for tied weights); `alone` (this rank: a group of one, for what must not be sharded).
        """
        world = dist.get_world_size()
        assert world == dp * pp * cp * tp, f"{world} ranks cannot be {dp} x {pp} x {cp} x {tp}"
        mesh = cls(dp=dp, pp=pp, cp=cp, tp=tp, rank=dist.get_rank(), device=device)
        opened: dict[str, dist.ProcessGroup | None] = {}
        for name, lines in (
            ("alone", mesh.lines()),
            *((axis, mesh.lines(axis)) for axis in AXES),
            ("copies", mesh.lines("dp", "cp")),
            ("ends", _ends(mesh)),
        ):
            if str(lines) not in opened:  # many axes of 1 are the same groups; each costs a rendezvous, on GPUs a communicator
                opened[str(lines)] = mesh._open(lines)
            if (group := opened[str(lines)]) is not None:
                mesh.groups[name] = group
        return mesh

    def _open(self, lines: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        found = None
        for line in lines:  # every rank takes part in the creation of every group, in the same order
            group = dist.new_group(list(line))
            if self.rank in line:
                assert isinstance(group, dist.ProcessGroup)
                found = group
        return found

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group this rank belongs to along `axis`."""
        return self.groups[axis]


def _ends(mesh: Mesh) -> list[list[int]]:
    """First and last stage of every pipeline; none where there is one stage."""
    return [[line[0], line[-1]] for line in mesh.lines("pp")] if mesh.pp > 1 else []
