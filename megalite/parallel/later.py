"""The backward pass in two halves, for zero-bubble schedules: what another stage waits for now, the gradients of the blocks' weights later.

In: a stage's blocks, and the sums that their gradients go to.  Out: `Later`: `hold` around a backward pass that leaves weights out, and
`held`, which gives what catches up on it. Qi et al. 2023, arXiv:2401.10241.

A product keeps its input and the gradient of its output until then, instead of everything else that the forward pass kept: a rank holds no
more than under 1F1B, but all ranks now hold as much as the first. Weights are not needed any more, so ZeRO-3 gathers none for the second
half. What is small, gradients of norms and of biases, is made in the first and waits, so that a bucket is filled by one pass. What is no
block is not put off: the gradient of a vocabulary is larger than what it is made of, and has buckets of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.parallel.sums import Sums


class Later:
    """Of one stage: its blocks' weights know it by the name `later`."""

    def __init__(self, blocks: Sequence[nn.Module], sums: Sums) -> None:
        self.sums = sums
        self.now: deque[Callable[[], None]] | None = None  # of the pass that is held
        self.last: deque[Callable[[], None]] = deque()
        for module in (module for block in blocks for module in block.modules()):
            for weight in module.parameters(recurse=False):
                weight.later = self  # type: ignore[attr-defined]
            if isinstance(module, nn.Linear):
                module.forward = partial(_forward, module)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Around a backward pass: gradients of the blocks' weights are left out."""
        self.now = deque()
        yield
        self.last, self.now = self.now, None

    def held(self) -> Callable[[], None]:
        """What gives the sums the gradients that the last pass left out."""
        return partial(self._catch_up, self.last)

    @torch.no_grad()
    def _catch_up(self, left: deque[Callable[[], None]]) -> None:
        while left:
            left.popleft()()
        self.sums.end_pass()

    def put_off(self, call: Callable[[], None]) -> bool:
        """Whether a pass is held; then the call is made later, in the order of the pass."""
        if self.now is not None:
            self.now.append(call)
        return self.now is not None

    def make(self, weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor, grad: Tensor) -> None:
        """The gradients of a product that was put off."""
        for parameter, gradient in zip((weight, bias), gradients(x, grad, biased=bias is not None), strict=True):
            if parameter is not None and gradient is not None:
                self.sums.add(parameter, gradient)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, whose weight's gradient may be made later where `Later` knows the weight."""
    return _Linear.apply(x, weight, bias) if hasattr(weight, "later") else F.linear(x, weight, bias)  # type: ignore[return-value]


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    """x (..., d) -> (..., f), for a weight (f, d) that is a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # themselves: what recomputation saves of a weight is another tensor
        # DeepSpeed's own, in F.linear, is a function for autograd, too
        return torch._C._nn.linear(x, weight, bias)  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x,), (grad,), weight, bias = ctx.saved_tensors, grads, ctx.weight, ctx.bias
        inner = grad @ weight if ctx.needs_input_grad[0] else None
        x = x.detach()  # else it would hold the graph that it came of, and with it what a stage received
        if weight.later.put_off(partial(weight.later.make, weight, bias, x, grad)):
            return inner, None, None
        return inner, *gradients(x, grad, biased=bias is not None)


def gradients(x: Tensor, grad: Tensor, *, biased: bool) -> tuple[Tensor, Tensor | None]:
    """Of weight (f, d) and bias (f,): of the input (..., d) and the output's gradient (..., f)."""
    rows = grad.flatten(0, -2)
    return rows.T @ x.flatten(0, -2), rows.sum(0) if biased else None
