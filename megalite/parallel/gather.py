"""When ZeRO-3's weights are gathered and let go: around every module, or once a step where all weights of a stage may stay.

In: a stage's layers and DeepSpeed's parameter offload, whose hooks ours replace.  Out: `Gathering`. What is fetched ahead, what may stay
and what is let go decides DeepSpeed's coordinator, within stage3_max_live_parameters and stage3_max_reuse_distance (see also mends.py).

DeepSpeed 0.19.8 counts, in one number for each module, the inputs whose gradients are still to come, and sets it to 0 in every forward.
With several microbatches in flight that number is wrong from the second backward on, and weights stayed gathered. A module of ours that
has weights has one input with a gradient and one output, so there is nothing to count. And DeepSpeed has hooks around every module, also
those without weights, in general functions that inspect their signature in every call: a quarter of a small model's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PRIVATE = "_PartitionedParameterCoordinator__"  # how Python spells that class's private names


class Gathering:
    """The hooks of one stage. `all_stay`: its weights are gathered when a step first needs them and stay until it ends."""

    def __init__(self, layers: list[nn.Module], offload: Any) -> None:
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        self.offload, self.coordinator = offload, offload.get_param_coordinator()
        self.num_elements = sum({id(p): p.ds_numel for layer in layers for p in layer.parameters()}.values())  # type: ignore[attr-defined]
        self.all_stay = self.num_elements <= self.limit()
        self.there: set[nn.Module] = set()
        if self.all_stay:
            # DeepSpeed's, in Python, are for weights that go and come back
            functional.linear = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
            for module in (module for layer in layers for module in layer.modules()):
                module._parameters = dict(module._parameters)
        for layer in layers:
            modules = [module for module in layer.modules() if next(module.parameters(recurse=False), None) is not None]
            if self.all_stay:
                self._stay_after_first_use(layer, modules)
            else:
                for module in modules:
                    self._gather_around(module)

    def limit(self) -> int:
        """Elements that may stay gathered."""
        return min(getattr(self.coordinator, f"{PRIVATE}max_{name}") for name in ("n_available_params", "reuse_dist_in_numel"))

    def end_step(self) -> None:
        """After the last backward pass of a step: let go of what stayed, for the optimizer renews it."""
        if self.all_stay:
            self.there.clear()
            self.offload.partition_all_parameters()

    def _stay_after_first_use(self, layer: nn.Module, modules: list[nn.Module]) -> None:
        def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if layer not in self.there:
                self.there.add(layer)
                for module in modules:
                    self._fetch(module, forward=True)

        layer.register_forward_pre_hook(before)

    def _gather_around(self, module: nn.Module) -> None:
        """Fetch before forward and backward, release after both. TypeError in the forward pass of one that puts out no single tensor."""
        fetch = _going_back(functools.partial(self._fetch, module, forward=False))
        release = _going_back(functools.partial(self.coordinator.release_sub_module, module, forward=False))

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._fetch(module, forward=True)
            return (release.apply(inputs[0]), *inputs[1:])

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                name = type(module).__name__
                raise TypeError(f"{name} has weights and puts out {type(output).__name__}; under ZeRO-3 it must be one tensor")
            self.coordinator.release_sub_module(module, forward=True)
            return fetch.apply(output)  # type: ignore[return-value]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _fetch(self, module: nn.Module, *, forward: bool) -> None:
        self.coordinator.trace_prologue(module)
        if self.coordinator.is_record_trace():
            self.coordinator.record_module(module)
        self.coordinator.fetch_sub_module(module, forward=forward)


def _going_back(call: Callable[[], None]) -> type[torch.autograd.Function]:
    """What it is applied to, unchanged; `call` is called when its gradient comes."""

    class GoingBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            call()
            return grads[0]

    return GoingBack
