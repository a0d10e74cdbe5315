"""Which gradients travel together, and where in what travels each of them lies.

In: DeepSpeed's optimizer, for its buffers, and how many elements may travel at once.  Out: `Bucket`s. `FlatBuckets` are for stages 1 and
2 of DeepSpeed, which cut a whole parameter group by rank, `ShardedBuckets` for 3, which cuts every parameter; see pieces.py. Either takes
what sums.py made of them back to the optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megalite.optim import runs

Put = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Bucket:
    """`size` elements, of which rank r updates the r-th of equal parts.

    `weights`: each with what adds its gradient to a buffer (size,). `host`: where the gradient of this rank's part belongs, fp32, beside
    its offloaded master weights; None where nothing is offloaded.
    """

    size: int
    weights: list[tuple[nn.Parameter, Put]]
    host: Tensor | None


class Buckets(ABC):
    """Of one rank, in the order in which a backward pass fills them, as parameter groups are; and the way back to the optimizer `inner`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        for hook in inner._grad_acc_hooks:  # DeepSpeed's own reduction
            hook.remove()
        self.every = self.cut()

    @abstractmethod
    def cut(self) -> list[Bucket]: ...

    @abstractmethod
    def hand_over(self, parts: list[Tensor]) -> None:
        """Each bucket's part of this rank to the optimizer, where nothing is offloaded."""


class FlatBuckets(Buckets):
    """A bucket for each parameter group, laid out as its weights: see `most` in engine.py."""

    def cut(self) -> list[Bucket]:
        inner, found = self.inner, []
        inner.temp_grad_buffer_for_gpu_offload = None  # as large as the largest weight, for gradients on their way to the host
        for flat, master, parameters in zip(
            inner.bit16_groups_flat, inner.single_partition_of_fp32_groups, inner.bit16_groups, strict=True
        ):
            starts = [parameter.storage_offset() - flat.storage_offset() for parameter in parameters]
            weights = [(parameter, partial(_put_flat, start, parameter.shape)) for parameter, start in zip(parameters, starts, strict=True)]
            found.append(Bucket(flat.numel(), weights, master.grad if inner.cpu_offload else None))
        return found

    def hand_over(self, parts: list[Tensor]) -> None:
        for index, (part, parameters) in enumerate(zip(parts, self.inner.bit16_groups, strict=True)):
            owned = [parameter._hp_mapping for parameter in parameters if parameter._hp_mapping is not None]
            places = [mapping.get_hp_fragment_address() for mapping in owned]
            self.inner.averaged_gradients[index] = _Part(part, [part[place.start : place.start + place.numel] for place in places])


class ShardedBuckets(Buckets):
    """Neighbours in a parameter group, of at most `most` elements, or one weight: a row for each rank, with its parts of them."""

    def __init__(self, inner: Any, *, num_ranks: int, most: int) -> None:
        self.num_ranks, self.most = num_ranks, most
        super().__init__(inner)

    def cut(self) -> list[Bucket]:
        inner = self.inner
        inner.grad_partitions_flat_buffer = None  # where DeepSpeed would sum up the parts
        inner._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        layers = [[list(layer) for _, layer in groupby(each, lambda parameter: parameter.cut.layer)] for each in inner.fp16_groups]
        self.runs = [runs(each, self.most, size=lambda parameter: parameter.ds_numel) for each in layers]
        found = []
        for flat, parts in zip(inner.fp32_partitioned_groups_flat, self.runs, strict=True):
            end = 0
            for parameters in parts:
                start, end = end, end + sum(parameter.partition_numel() for parameter in parameters)
                found.append(self._bucket(parameters, flat.grad[start:end] if inner.offload_optimizer else None))
        return found

    def _bucket(self, parameters: list[Any], host: Tensor | None) -> Bucket:
        ends = list(accumulate(parameter.partition_numel() for parameter in parameters))
        places = [range(start, end) for start, end in pairwise([0, *ends])]
        weights = [(parameter, partial(_put_sharded, ends[-1], place)) for parameter, place in zip(parameters, places, strict=True)]
        return Bucket(ends[-1] * self.num_ranks, weights, host)

    def hand_over(self, parts: list[Tensor]) -> None:
        rest = iter(parts)
        for index, found in enumerate(self.runs):
            lengths = [[parameter.partition_numel() for parameter in parameters] for parameters in found]
            self.inner.averaged_gradients[index] = [piece for each in lengths for piece in next(rest).split(each)]


def _put_flat(start: int, shape: torch.Size, buffer: Tensor, gradient: Tensor) -> None:
    buffer[start : start + shape.numel()].view(shape).add_(gradient)


def _put_sharded(width: int, place: range, buffer: Tensor, gradient: Tensor) -> None:
    """The r-th part of a gradient to that place in row r of a buffer of rows of `width`."""
    flat, columns = gradient.reshape(-1), buffer.view(-1, width)[:, place.start : place.stop]
    rows, rest = divmod(len(flat), len(place))
    columns[:rows].add_(flat[: rows * len(place)].view(rows, len(place)))
    if rest:
        columns[rows, :rest].add_(flat[rows * len(place) :])


class _Part(list[Tensor]):
    """Gradients of a group's parameters, as views of `flat_partition`, which DeepSpeed then need not put together again."""

    def __init__(self, flat: Tensor, gradients: list[Tensor]) -> None:
        super().__init__(gradients)
        self.flat_partition = flat
