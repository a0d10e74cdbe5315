"""Gradients that are reduced once a step: whole on every rank, summed in fp32 over the microbatches. ZeRO 0 and 1; 2 and 3 if told to.

In: DeepSpeed's optimizer, for its buffers.  Out: before its step, the gradients of what this rank updates. A weight's gradient is added as
soon as it is there, and let go. With the last microbatch's a buffer is full, and goes to the other ranks while the backward pass goes on.
So a step sends what it would with a single microbatch, and in full precision, for 4 bytes a parameter: ZeRO-1 as Rajbhandari et al. 2019,
arXiv:1910.02054 (section 5.1), describe it, and as Megatron-LM's distributed optimizer does. `FlatSums` are for stages 1 and 2 of
DeepSpeed, `ShardedSums` for 3; see pieces.py for how they differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Sums(ABC):
    """Flat buffers, of which the r-th part is what rank r of the group updates. whole (ZeRO 0): every rank updates everything."""

    def __init__(self, inner: Any, group: dist.ProcessGroup, *, whole: bool = False) -> None:
        self.inner, self.group, self.whole = inner, group, whole
        for hook in inner._grad_acc_hooks:  # DeepSpeed's, which reduce every microbatch
            hook.remove()
        self.buffers: list[Tensor] = []
        self.num_weights: list[int] = []  # of each buffer
        self.missing: list[int] = []  # gradients, of each buffer, until it is full
        self.under_way: dict[int, Any] = {}  # transfers, by the number of the buffer
        self.make()

    @abstractmethod
    def make(self) -> None:
        """Call `hold` for every buffer."""

    @abstractmethod
    def hand_over(self, parts: list[Tensor]) -> None:
        """To DeepSpeed's optimizer, the parts of the buffers that this rank updates."""

    def hold(self, buffer: Tensor, places: list[tuple[nn.Parameter, Tensor]]) -> None:
        """From now on the gradients of these weights are added to these places of the buffer."""
        for parameter, place in places:
            parameter.register_post_accumulate_grad_hook(partial(self._add, len(self.buffers), place))
        self.buffers.append(buffer)
        self.num_weights.append(len(places))
        self.missing.append(0)

    def clear(self, num_microbatches: int) -> None:
        """Before the first microbatch of a step of so many."""
        torch._foreach_zero_(self.buffers)  # pyright: ignore[reportPrivateImportUsage]
        self.missing = [num * num_microbatches for num in self.num_weights]

    @torch.no_grad()
    def reduce(self) -> None:
        """The mean over the ranks that hold the same weights."""
        num = dist.get_world_size(self.group)
        if num > 1:
            for number in range(len(self.buffers)):
                if number not in self.under_way:  # some weight of it had no gradient
                    self.under_way[number] = self._send(number)
            for work in self.under_way.values():
                work.wait()
            self.under_way.clear()
        parts = [self._part(buffer) for buffer in self.buffers]
        if num > 1:
            torch._foreach_div_(parts, num)  # pyright: ignore[reportPrivateImportUsage]
        self.hand_over(parts)

    @torch.no_grad()
    def _add(self, number: int, place: Tensor, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        place.add_(parameter.grad)
        parameter.grad = None
        self.missing[number] -= 1
        if not self.missing[number] and dist.get_world_size(self.group) > 1:
            self.under_way[number] = self._send(number)

    def _send(self, number: int) -> Any:
        buffer = self.buffers[number]
        if self.whole:
            return dist.all_reduce(buffer, group=self.group, async_op=True)
        return dist.reduce_scatter_tensor(self._part(buffer), buffer, group=self.group, async_op=True)  # in place

    def _part(self, buffer: Tensor) -> Tensor:
        """What this rank updates."""
        size, rank = len(buffer) // dist.get_world_size(self.group), dist.get_rank(self.group)
        return buffer if self.whole else buffer[rank * size : (rank + 1) * size]


class FlatSums(Sums):
    """A buffer for each parameter group, laid out as its weights."""

    def make(self) -> None:
        self.inner.temp_grad_buffer_for_gpu_offload = None  # as large as the largest weight, for gradients on their way to the host
        for weights, parameters in zip(self.inner.bit16_groups_flat, self.inner.bit16_groups, strict=True):
            buffer, places = torch.zeros_like(weights, dtype=torch.float32), []
            for parameter in parameters:
                start = parameter.storage_offset() - weights.storage_offset()
                places.append((parameter, buffer[start : start + parameter.numel()].view_as(parameter)))
            self.hold(buffer, places)

    def hand_over(self, parts: list[Tensor]) -> None:
        for index, (part, parameters) in enumerate(zip(parts, self.inner.bit16_groups, strict=True)):
            if self.inner.cpu_offload:
                self.inner.single_partition_of_fp32_groups[index].grad.copy_(part)
                continue
            owned = [parameter._hp_mapping for parameter in parameters if parameter._hp_mapping is not None]
            places = [mapping.get_hp_fragment_address() for mapping in owned]
            self.inner.averaged_gradients[index] = _Part(part, [part[place.start : place.start + place.numel] for place in places])


class ShardedSums(Sums):
    """A buffer for each parameter, padded to equal parts."""

    def make(self) -> None:
        num = dist.get_world_size(self.group)
        for parameter in (parameter for parameters in self.inner.fp16_groups for parameter in parameters):
            buffer = torch.zeros(num * parameter.partition_numel(), dtype=torch.float32, device=parameter.device)
            self.hold(buffer, [(parameter, buffer[: parameter.ds_numel].view(parameter.ds_shape))])
        self.inner.grad_partitions_flat_buffer = None  # where DeepSpeed would sum up the parts
        self.inner._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        for bucket in self.inner.ipg_buckets.values():
            bucket.buffer = None

    def hand_over(self, parts: list[Tensor]) -> None:
        rest = iter(parts)
        for index, parameters in enumerate(self.inner.fp16_groups):
            gradients = [next(rest) for _ in parameters]
            if self.inner.offload_optimizer:
                self.inner.fp32_partitioned_groups_flat[index].grad.copy_(torch.cat(gradients))
            else:
                self.inner.averaged_gradients[index] = gradients


class _Part(list[Tensor]):
    """Gradients of a group's parameters, as views of `flat_partition`, which DeepSpeed then need not put together again."""

    def __init__(self, flat: Tensor, gradients: list[Tensor]) -> None:
        super().__init__(gradients)
        self.flat_partition = flat
