"""Collectives that autograd can walk back, over one process group given as an argument.

`copy` and `reduce` are the pair f and g of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3); `scatter` is the second of the
pair of its sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2), whose first is in `tensor.py`, one with its
product; `exchange` is the all-to-all of DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509). Underneath are torch's functional
collectives: they put out new tensors, which selective recomputation can keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ops = torch.ops._c10d_functional


def named(name: str) -> dist.ProcessGroup:
    """The process group of that name: what torch's operations are told a group by."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group."""
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.group_name))


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of every rank along dim 1, in the order of ranks: (b, s / n, ...) -> (b, s, ...)."""
    parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
    return parts.unflatten(0, (group.size(), -1)).movedim(0, 1).flatten(1, 2)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along dim 1, of the sum over the group: (b, s, ...) -> (b, s / n, ...)."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).flatten(0, 1)
    return ops.wait_tensor(ops.reduce_scatter_tensor(parts.contiguous(), "sum", group.size(), group.group_name))


def all_to_all(x: Tensor, group: dist.ProcessGroup, *, split: int, join: int) -> Tensor:
    """Part r of dim `split` goes to rank r; what comes from the ranks is joined along dim `join`, in their order."""
    num = group.size()
    parts = x.unflatten(split, (num, -1)).movedim(split, 0).contiguous()
    sizes = [1] * num
    return ops.wait_tensor(ops.all_to_all_single(parts, sizes, sizes, group.group_name)).movedim(0, join).flatten(join, join + 1)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return all_to_all(x, group, split=split, join=join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grads[0], ctx.group, split=ctx.join, join=ctx.split), None, None, None


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which every rank of the group holds alike; its gradient is the sum over the group."""
    return _Copy.apply(x, group)  # type: ignore[return-value]


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the group; the gradient passes through."""
    return _Reduce.apply(x, group)  # type: ignore[return-value]


def scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along dim 1, of the sum of x over the group; the gradient is gathered."""
    return _Scatter.apply(x, group)  # type: ignore[return-value]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's part of x along dim 1; the gradient, in parts on every rank, is summed and scattered."""
    return _Gather.apply(x, group)  # type: ignore[return-value]


def exchange(x: Tensor, group: dist.ProcessGroup, *, split: int, join: int) -> Tensor:
    """Cut along `split` before, along `join` after; the gradient goes the other way."""
    return _Exchange.apply(x, group, split, join)  # type: ignore[return-value]
