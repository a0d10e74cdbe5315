"""Gradients, summed over the microbatches of a step and over the ranks that hold the same weights.

In: buckets (buckets.py), whose weights' gradients are put into a buffer as soon as they are there, and let go.  Out: before the optimizer's
step, the mean gradients of what this rank updates, in fp32, where the optimizer looks for them. There are two ways:

    StepSums         buffers in fp32, whole on every rank, all the time. With the last microbatch's gradient one is full, and goes to the
                     other ranks while the backward pass goes on. So a step sends what it would with a single microbatch, in full precision.
    MicrobatchSums   a buffer is made with its first gradient. With the last one it goes to the other ranks while the backward pass goes on;
                     this rank's part of it is added to sums, which are all that stays. So gradients are cut by rank as master weights are.

Rajbhandari et al. 2019, arXiv:1910.02054, section 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.parallel.buckets import Bucket, Buckets, Put

Exchange = Callable[[Tensor], Tensor]


class Sums(ABC):
    """Over the ranks of `group`: `begin`, the backward passes, `end_pass` after each, `reduce` after the last."""

    def __init__(self, buckets: Buckets, group: dist.ProcessGroup) -> None:
        self.buckets, self.group = buckets, group
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.missing = [len(bucket.weights) for bucket in buckets.every]  # gradients, until a bucket is full
        self.places: dict[Any, tuple[int, Put]] = {}  # by weight: its bucket, and where in it
        for number, bucket in enumerate(buckets.every):
            for parameter, put in bucket.weights:
                self.places[parameter] = number, put
                parameter.register_post_accumulate_grad_hook(self._take)

    @abstractmethod
    def begin(self, num_microbatches: int) -> None:
        """Before the first microbatch of a step of so many."""

    @abstractmethod
    def end_pass(self) -> None: ...

    @abstractmethod
    def reduce(self) -> None: ...

    @abstractmethod
    def put(self, number: int, put: Put, gradient: Tensor) -> None:
        """Into the buffer of a bucket."""

    @abstractmethod
    def send(self, number: int) -> None:
        """A bucket that is full."""

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        later = getattr(parameter, "later", None)  # later.py
        if gradient is None:
            assert later is not None and later.now is not None, "autograd came to a weight without a gradient"
            return  # the product was put off
        if later is None or not later.put_off(partial(self.add, parameter, gradient)):
            self.add(parameter, gradient)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """The gradient of a microbatch."""
        number, put = self.places[parameter]
        self.put(number, put, gradient)
        self.missing[number] -= 1
        if not self.missing[number]:
            self.send(number)

    def part(self, buffer: Tensor) -> Tensor:
        """What this rank updates."""
        size = len(buffer) // self.num_ranks
        return buffer[self.rank * size : (self.rank + 1) * size]

    def scatter(self, buffer: Tensor) -> Any:
        """Begin to sum up over the ranks, in place."""
        return dist.reduce_scatter_tensor(self.part(buffer), buffer, group=self.group, async_op=True)


class StepSums(Sums):
    """Whole gradients, sent once a step. whole (ZeRO 0): every rank updates everything."""

    def __init__(self, buckets: Buckets, group: dist.ProcessGroup, *, device: torch.device, whole: bool = False) -> None:
        super().__init__(buckets, group)
        self.whole = whole
        self.buffers = [torch.zeros(bucket.size, dtype=torch.float32, device=device) for bucket in buckets.every]
        self.under_way: dict[int, Any] = {}  # transfers, by the number of the bucket

    def begin(self, num_microbatches: int) -> None:
        torch._foreach_zero_(self.buffers)  # pyright: ignore[reportPrivateImportUsage]
        self.missing = [len(bucket.weights) * num_microbatches for bucket in self.buckets.every]

    def put(self, number: int, put: Put, gradient: Tensor) -> None:
        put(self.buffers[number], gradient)

    def send(self, number: int) -> None:
        if self.num_ranks > 1:
            buffer = self.buffers[number]
            self.under_way[number] = dist.all_reduce(buffer, group=self.group, async_op=True) if self.whole else self.scatter(buffer)

    def end_pass(self) -> None:
        pass

    @torch.no_grad()
    def reduce(self) -> None:
        for number in range(len(self.buffers)):
            if number not in self.under_way:  # some weight of it had no gradient
                self.send(number)
        for work in self.under_way.values():
            work.wait()
        self.under_way.clear()
        parts = [buffer if self.whole else self.part(buffer) for buffer in self.buffers]
        if self.num_ranks > 1:
            torch._foreach_div_(parts, self.num_ranks)  # pyright: ignore[reportPrivateImportUsage]
        if host := [bucket.host for bucket in self.buckets.every if bucket.host is not None]:
            torch._foreach_copy_(host, parts)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self.buckets.hand_over(parts)


class MicrobatchSums(Sums):
    """Gradients cut by rank, sent after every microbatch. One bucket is on its way while the next is filled."""

    def __init__(
        self,
        buckets: Buckets,
        group: dist.ProcessGroup,
        *,
        device: torch.device,
        dtype: torch.dtype,
        overlap: bool = True,
        divide: float = 1.0,
        exchange: Exchange | None = None,
    ) -> None:
        """dtype: in which gradients travel. overlap: whether the backward pass goes on meanwhile. divide: what they are divided by before
        they are summed; it makes no difference to the mean. exchange: takes the place of a sum over the ranks, for buckets of one weight:
        its gradient in, this rank's part of the mean out.
        """
        super().__init__(buckets, group)
        self.device, self.dtype, self.overlap, self.divide, self.exchange = device, dtype, overlap, divide, exchange
        self.filling: dict[int, Tensor] = {}  # buffers, by the number of the bucket
        self.under_way: tuple[int, Tensor, Any] | None = None  # the one that was sent
        self.offloaded = any(bucket.host is not None for bucket in buckets.every)
        self.sums = [self._sum(bucket) for bucket in buckets.every]
        self.begun: set[int] = set()  # of this step's sums
        self.copying = torch.cuda.Stream() if self.offloaded and device.type == "cuda" else None

    def _sum(self, bucket: Bucket) -> Tensor:
        if bucket.host is not None:
            return bucket.host
        return torch.zeros(bucket.size // self.num_ranks, dtype=torch.float32, device=self.device)

    def begin(self, num_microbatches: int) -> None:
        self.begun.clear()
        if not self.offloaded:
            torch._foreach_zero_(self.sums)  # pyright: ignore[reportPrivateImportUsage]

    def put(self, number: int, put: Put, gradient: Tensor) -> None:
        bucket = self.buckets.every[number]
        if self.exchange:
            self.filling[number] = gradient
        elif len(bucket.weights) == 1 and (gradient.numel(), gradient.dtype) == (bucket.size, self.dtype) and gradient.is_contiguous():
            self.filling[number] = gradient.view(-1)  # needs no buffer
        else:
            if number not in self.filling:
                self.filling[number] = torch.zeros(bucket.size, dtype=self.dtype, device=self.device)
            put(self.filling[number], gradient)

    def send(self, number: int) -> None:
        self._arrive()
        buffer, self.missing[number] = self.filling.pop(number), len(self.buckets.every[number].weights)
        if self.exchange:
            self.under_way = number, self.exchange(buffer), None
        else:
            if self.divide != 1:
                buffer.div_(self.divide)
            self.under_way = number, self.part(buffer), self.scatter(buffer) if self.num_ranks > 1 else None
        if not self.overlap:
            self._arrive()

    def end_pass(self) -> None:
        for number in sorted(self.filling):  # some weight of it had no gradient
            self.send(number)
        self._arrive()

    @torch.no_grad()
    def reduce(self) -> None:
        if not self.offloaded:
            self.buckets.hand_over(self.sums)
            return
        if self.copying:
            self.copying.synchronize()
        for number in set(range(len(self.sums))) - self.begun:
            self.sums[number].zero_()

    @torch.no_grad()
    def _arrive(self) -> None:
        """What was sent is added to the sums."""
        if self.under_way is None:
            return
        number, part, work = self.under_way
        self.under_way = None
        if work:
            work.wait()
        scale = 1.0 if self.exchange else self.divide / self.num_ranks
        total = self.sums[number][: len(part)]  # an exchange leaves padding out
        if self.offloaded:
            self._add_on_the_host(number, total, part, scale)
        else:
            total.add_(part, alpha=scale)

    def _add_on_the_host(self, number: int, total: Tensor, part: Tensor, scale: float) -> None:
        """The sums come, are added to, and go back to the host, beside the computation."""
        if self.copying:
            self.copying.wait_stream(torch.cuda.current_stream())
            part.record_stream(self.copying)
        with torch.cuda.stream(self.copying):  # None: where it is
            here = part.float().mul_(scale)
            if number in self.begun:
                here.add_(total.to(self.device, non_blocking=True))
            total.copy_(here, non_blocking=True)
        self.begun.add(number)
