"""Gradients that are reduced once a step: whole on every rank, summed in fp32 over the microbatches. ZeRO 0 and 1; 2 and 3 if told to.

In: DeepSpeed's optimizer, for its buffers.  Out: before its step, the gradients of what this rank updates. A weight's gradient is added as
soon as it is there, and let go; nothing travels before the step ends. So a step sends what it would with a single microbatch, and in full
precision, for 4 bytes a parameter: ZeRO-1 as Rajbhandari et al. 2019, arXiv:1910.02054 (section 5.1), describe it, and as Megatron-LM's
distributed optimizer does. `FlatSums` are for stages 1 and 2 of DeepSpeed, `ShardedSums` for 3; see pieces.py for how they differ.
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
        self.buffers: list[Tensor] = self.make()

    @abstractmethod
    def make(self) -> list[Tensor]:
        """The buffers, to whose places the gradients are added from now on."""

    @abstractmethod
    def hand_over(self, parts: list[Tensor]) -> None:
        """To DeepSpeed's optimizer, the parts of the buffers that this rank updates."""

    def clear(self) -> None:
        """Before the first microbatch of a step."""
        torch._foreach_zero_(self.buffers)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def reduce(self) -> None:
        """The mean over the ranks that hold the same weights, all transfers in flight at once."""
        num = dist.get_world_size(self.group)
        parts = self.buffers if self.whole else [buffer.chunk(num)[dist.get_rank(self.group)] for buffer in self.buffers]
        if num > 1:
            for work in [self._send(*pair) for pair in zip(self.buffers, parts, strict=True)]:
                work.wait()
            torch._foreach_div_(parts, num)  # pyright: ignore[reportPrivateImportUsage]
        self.hand_over(parts)

    def _send(self, buffer: Tensor, part: Tensor) -> Any:
        if self.whole:
            return dist.all_reduce(buffer, group=self.group, async_op=True)
        return dist.reduce_scatter_tensor(part, buffer, group=self.group, async_op=True)  # in place


class FlatSums(Sums):
    """A buffer for each parameter group, laid out as its weights."""

    def make(self) -> list[Tensor]:
        self.inner.temp_grad_buffer_for_gpu_offload = None  # as large as the largest weight, for gradients on their way to the host
        buffers = [torch.zeros_like(weights, dtype=torch.float32) for weights in self.inner.bit16_groups_flat]
        for buffer, weights, parameters in zip(buffers, self.inner.bit16_groups_flat, self.inner.bit16_groups, strict=True):
            for parameter in parameters:
                start = parameter.storage_offset() - weights.storage_offset()
                _add_to(buffer[start : start + parameter.numel()].view_as(parameter), parameter)
        return buffers

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

    def make(self) -> list[Tensor]:
        num, buffers = dist.get_world_size(self.group), []
        for parameter in self._parameters():
            buffer = torch.zeros(num * parameter.partition_numel(), dtype=torch.float32, device=parameter.device)
            _add_to(buffer[: parameter.ds_numel].view(parameter.ds_shape), parameter)
            buffers.append(buffer)
        self.inner.grad_partitions_flat_buffer = None  # where DeepSpeed would sum up the parts
        self.inner._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        for bucket in self.inner.ipg_buckets.values():
            bucket.buffer = None
        return buffers

    def hand_over(self, parts: list[Tensor]) -> None:
        rest = iter(parts)
        for index, parameters in enumerate(self.inner.fp16_groups):
            gradients = [next(rest) for _ in parameters]
            if self.inner.offload_optimizer:
                self.inner.fp32_partitioned_groups_flat[index].grad.copy_(torch.cat(gradients))
            else:
                self.inner.averaged_gradients[index] = gradients

    def _parameters(self) -> list[Any]:
        return [parameter for parameters in self.inner.fp16_groups for parameter in parameters]


class _Part(list[Tensor]):
    """Gradients of a group's parameters, as views of `flat_partition`, which DeepSpeed then need not put together again."""

    def __init__(self, flat: Tensor, gradients: list[Tensor]) -> None:
        super().__init__(gradients)
        self.flat_partition = flat


def _add_to(place: Tensor, parameter: nn.Parameter) -> None:
    parameter.register_post_accumulate_grad_hook(partial(_add, place))


@torch.no_grad()
def _add(place: Tensor, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    place.add_(parameter.grad)
    parameter.grad = None
