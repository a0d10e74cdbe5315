"""Collectives that autograd can walk back, over one process group given as an argument.

`copy` and `reduce` are the pair f and g of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        if grad is grads[0]:
            grad = grad.clone()  # autograd may hand the same tensor to others
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which every rank of the group holds alike; its gradient is the sum over the group."""
    return _Copy.apply(x, group)  # type: ignore[return-value]


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the group; the gradient passes through."""
    return _Reduce.apply(x, group)  # type: ignore[return-value]
