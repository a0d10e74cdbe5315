"""What a rank owns under ZeRO: for every parameter, one flat range of its local shard, with master weight, gradient and moments.

In: DeepSpeed's ZeRO optimizer, as it lays its buffers out.  Out: `Piece`s, views into those buffers, so that whoever reads or writes
them needs to know no stage. `Flat` reads stages 1 and 2, which cut a whole parameter group's flat buffer by rank; `Sharded` reads stage
3, which cuts every parameter by rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.layout import Cut
from megalite.mesh import Mesh
from megalite.parallel import disk

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + master.numel()) of one flattened local shard, as this rank owns them. All tensors are views, 1-D.

    `moments` are AdamW's exp_avg and exp_avg_sq, fp32 like the master weight; `gradient` is there only between the reduction and
    the update (offloaded: always, but it means something only then). Where several ranks hold the same elements, `first` is true on
    one of them: tp copies on tp rank 0, tied copies on the first stage, dp and cp copies (ZeRO 0) on the first of these ranks. The norm
    counts and a checkpoint stores what is first.
    """

    cut: Cut
    start: int
    master: Tensor
    moments: dict[str, Tensor]
    gradient: Tensor | None
    tied: bool
    first: bool


class Owned(ABC):
    """The pieces of one rank; `tied` names weights that lie on the first and on the last stage, `replicated` is ZeRO 0.

    folder: what the optimizer keeps goes there, see disk.py.
    """

    def __init__(self, inner: Any, *, mesh: Mesh, tied: set[str], replicated: bool, folder: Path | None = None) -> None:
        self.inner, self.mesh, self.tied, self.replicated = inner, mesh, tied, replicated
        for flat in self.flats():  # from the start, so that a checkpoint can be read into them in place
            state = self.inner.optimizer.state[flat]
            if folder is not None:
                disk.move(flat, folder)
                assert flat.grad is not None, "DeepSpeed holds offloaded gradients beside the weights"
                disk.move(flat.grad, folder)
            if "exp_avg" not in state:
                zeros = torch.zeros_like if folder is None else partial(disk.zeros_like, folder=folder)
                state.update(step=torch.zeros((), device=flat.device), **{name: zeros(flat) for name in MOMENTS})

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The buffers of fp32 master weights that the optimizer updates."""

    @abstractmethod
    def walk(self) -> Iterator[Piece]:
        """Every piece, in a fixed order."""

    @abstractmethod
    def renew(self) -> None:
        """Copy the master weights into the weights the model computes with."""

    def pieces(self) -> list[Piece]:
        return list(self.walk())

    def restore(self, steps: int) -> None:
        """After master weights and moments were written from outside: `steps` optimizer steps were taken."""
        for flat in self.flats():
            self.inner.optimizer.state[flat]["step"] = torch.full((), float(steps), device=flat.device)
        self.renew()

    def _offloaded(self, index: int, place: range) -> Tensor | None:
        """The gradient of a part of a buffer, where it lies beside the buffer in host memory; None where nothing is offloaded."""
        gradient = self.flats()[index].grad
        return None if gradient is None else gradient[place.start : place.stop]

    def _piece(self, parameter: nn.Parameter, start: int, flat: Tensor, place: range, gradient: Tensor | None) -> Piece:
        state, mesh = self.inner.optimizer.state[flat], self.mesh
        cut: Cut = parameter.cut  # type: ignore[attr-defined]
        tied = cut.name in self.tied
        copy = (
            (cut.dim is None and mesh.tp_rank > 0)
            or (tied and not mesh.first_stage)
            or (self.replicated and mesh.dp_rank + mesh.cp_rank > 0)
        )
        return Piece(
            cut=cut,
            start=start,
            master=flat.detach()[place.start : place.stop],
            moments={name: state[name][place.start : place.stop] for name in MOMENTS},
            gradient=None if gradient is None else gradient.detach().view(-1)[: len(place)],
            tied=tied,
            first=not copy,
        )


class Flat(Owned):
    """ZeRO 1 and 2: rank r owns the r-th part of each parameter group's flat buffer, whatever parameters lie there."""

    def flats(self) -> list[Tensor]:
        return self.inner.single_partition_of_fp32_groups

    def walk(self) -> Iterator[Piece]:
        for index, parameters in enumerate(self.inner.bit16_groups):
            averaged = self.inner.averaged_gradients.get(index)
            found = [gradient for gradient in averaged or () if not getattr(gradient, "_zero_padding", False)]
            owned = [parameter for parameter in parameters if parameter._hp_mapping is not None]
            # a partition may end in padding, which some paths of DeepSpeed 0.19.8 do not mark
            assert not averaged or len(found) - len(owned) in (0, 1), "gradients and parameters of a partition do not match"
            for number, parameter in enumerate(owned):
                local, here = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.get_hp_fragment_address()
                place = range(here.start, here.start + here.numel)
                gradient = self._offloaded(index, place)  # goes before: DeepSpeed may keep what it summed besides, and update with this
                gradient = found[number] if gradient is None and averaged else gradient
                yield self._piece(parameter, local.start, self.flats()[index], place, gradient)

    def renew(self) -> None:
        self.inner.update_lp_params()


class Sharded(Owned):
    """ZeRO 3: rank r owns the r-th of equal parts of each parameter; the last part may end in padding, which is garbage."""

    def flats(self) -> list[Tensor]:
        return self.inner.fp32_partitioned_groups_flat

    def walk(self) -> Iterator[Piece]:
        rank = dist.get_rank(self.mesh.group("copies"))
        for index, parameters in enumerate(self.inner.fp16_groups):
            gradients, offset = self.inner.averaged_gradients.get(index), 0
            for number, parameter in enumerate(parameters):
                length = parameter.partition_numel()
                start = min(rank * length, parameter.ds_numel)
                size = min(length, parameter.ds_numel - start)
                if size:
                    place = range(offset, offset + size)
                    gradient = self._offloaded(index, place)
                    gradient = gradients[number] if gradient is None and gradients else gradient
                    yield self._piece(parameter, start, self.flats()[index], place, gradient)
                offset += length

    def renew(self) -> None:
        self.inner.parameter_offload.partition_all_parameters()
        self.inner.invalidate_secondary_tensor()  # ZeRO++'s copies within a node
        for parameters, flat in zip(self.inner.fp16_groups, self.flats(), strict=True):
            offset = 0
            for parameter in parameters:
                length = parameter.partition_numel()
                parameter.ds_tensor.data.copy_(flat.detach()[offset : offset + length].view_as(parameter.ds_tensor))
                offset += length
        if kept := self.inner.persistent_parameters:  # small ones, which stay gathered between steps
            kept[0].partition(kept)
            kept[0].all_gather(kept)
