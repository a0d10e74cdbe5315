"""Gradients under ZeRO 0 and 1: whole on every rank, summed in fp32 over the microbatches of a step, reduced once when it ends.

In: DeepSpeed's optimizer of stages 1 and 2, for its buffers.  Out: before its step, the gradients of what this rank updates. A weight's
gradient is added as soon as it is there, and let go; nothing travels before the step ends. So a step sends what it would with a single
microbatch, and in full precision, for 4 bytes a parameter that ZeRO-2 shards: what Rajbhandari et al. 2019, arXiv:1910.02054 (section 5.1)
describe, and what Megatron-LM's distributed optimizer does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Sums:
    """One flat buffer for each parameter group, laid out as DeepSpeed's weights: the r-th part is what rank r updates.

    whole (ZeRO 0): every rank updates everything.
    """

    def __init__(self, inner: Any, group: dist.ProcessGroup, *, whole: bool) -> None:
        self.inner, self.group, self.whole = inner, group, whole
        for hook in inner._grad_acc_hooks:  # which would reduce every microbatch
            hook.remove()
        inner.temp_grad_buffer_for_gpu_offload = None  # as large as the largest weight, for gradients on their way to the host
        self.flats = [torch.zeros_like(weights, dtype=torch.float32) for weights in inner.bit16_groups_flat]
        for flat, weights, parameters in zip(self.flats, inner.bit16_groups_flat, inner.bit16_groups, strict=True):
            for parameter in parameters:
                start = parameter.storage_offset() - weights.storage_offset()
                place = flat[start : start + parameter.numel()].view_as(parameter)
                parameter.register_post_accumulate_grad_hook(partial(_add, place))

    def clear(self) -> None:
        """Before the first microbatch of a step."""
        torch._foreach_zero_(self.flats)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def reduce(self) -> None:
        """Their mean over the ranks that hold the same weights, and for DeepSpeed's optimizer the part that this rank updates."""
        num = dist.get_world_size(self.group)
        mine = self.flats if self.whole else [flat.chunk(num)[dist.get_rank(self.group)] for flat in self.flats]
        if num > 1:
            works = [self._send(*buffers) for buffers in zip(self.flats, mine, strict=True)]
            for work in works:
                work.wait()
            torch._foreach_div_(mine, num)  # pyright: ignore[reportPrivateImportUsage]
        for index, (part, parameters) in enumerate(zip(mine, self.inner.bit16_groups, strict=True)):
            if self.inner.cpu_offload:
                self.inner.single_partition_of_fp32_groups[index].grad.copy_(part)
                continue
            owned = [parameter._hp_mapping for parameter in parameters if parameter._hp_mapping is not None]
            places = [mapping.get_hp_fragment_address() for mapping in owned]
            self.inner.averaged_gradients[index] = _Part(part, [part[place.start : place.start + place.numel] for place in places])

    def _send(self, flat: Tensor, mine: Tensor) -> Any:
        if self.whole:
            return dist.all_reduce(flat, group=self.group, async_op=True)
        return dist.reduce_scatter_tensor(mine, flat, group=self.group, async_op=True)  # in place


class _Part(list[Tensor]):
    """Gradients of a group's parameters, as views of `flat_partition`, which DeepSpeed then need not put together again."""

    def __init__(self, flat: Tensor, gradients: list[Tensor]) -> None:
        super().__init__(gradients)
        self.flat_partition = flat


@torch.no_grad()
def _add(place: Tensor, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    place.add_(parameter.grad)
    parameter.grad = None
