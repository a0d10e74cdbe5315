"""ZeRO-3's weights: which stay gathered for a whole step, which come and go, and what is fetched ahead of its use.

In: a stage's layers, DeepSpeed's parameter offload (which cuts weights and puts them together), and limits of the DeepSpeed JSON.
Out: `Gathering`, whose hooks around modules with weights take the place of DeepSpeed's around all.

What stays is chosen once: all of a stage's weights where they fit into the limit, else its last ones, as many as leave room for the largest
of the others and for what is fetched ahead. The rest comes for each use and goes. So a step gathers what stays once, its memory is the same
in every step, and it can be foretold (tune/sizes.py). What comes next says the step before, for a schedule takes the same way through the
modules every time; a weight that is needed again within what is fetched ahead is kept until then.

DeepSpeed 0.19.8 has a coordinator for this. It keeps what it saw to be needed again while it fetched ahead, and fetches ahead until the
limit is met: a small limit filled up with weights of a later microbatch, while those at work were fetched at once. It counts the inputs
whose gradients are still to come in one number for each module, which is wrong where several microbatches are in flight, and its trace
begins at every root forward, where a schedule never repeats it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Limits(NamedTuple):
    """Elements of a stage that may be gathered at once, and those of them that may be there ahead of their use."""

    live: int
    ahead: int


class Gathering:
    """The hooks of one stage, and what is gathered of it. `all_stay`: each layer's weights, from its first use to the end of a step."""

    def __init__(self, layers: list[nn.Module], offload: Any, limits: Limits, *, device: torch.device, quantized: bool = False) -> None:
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        self.offload, self.limits, self.quantized = offload, limits, quantized
        weights: list[Any] = list({id(weight): weight for layer in layers for weight in layer.parameters()}.values())
        self.num_elements = sum(weight.ds_numel for weight in weights)
        self.all_stay = self.num_elements <= limits.live
        stay, self.ahead = choose([weight.ds_numel for weight in weights], limits)
        self.staying = {weight for weight in weights if weight.ds_persist} | set(weights[len(weights) - stay :])
        self.of: dict[nn.Module, list[Any]] = {}  # weights by the module, or where all stay the layer, that is hooked
        self.way: list[nn.Module] = []  # of a step through them
        self.forwards: list[nn.Module] = []  # the same of forwards that are no training step
        self.at = self.until = 0  # on the way: what is reached next, and next fetched ahead
        self.active: Counter[nn.Module] = Counter()  # reached and not yet released
        self.uses: Counter[Any] = Counter()  # by weight that comes and goes: active modules, and modules between `at` and `until`
        self.coming: dict[Any, tuple[Any, Any]] = {}  # weights on their way, and how to wait for them
        self.copying, self.idle = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        if self.all_stay:
            # DeepSpeed's, in Python, are for weights that go and come back
            functional.linear = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
            for module in (module for layer in layers for module in layer.modules()):
                module._parameters = dict(module._parameters)
        for layer in layers:
            if self.all_stay:
                self._fetch_at_first_use(layer)
            else:
                for module in layer.modules():
                    if next(module.parameters(recurse=False), None) is not None:
                        self._fetch_around(module)

    def end_step(self) -> None:
        """After the last backward pass of a step: let go of what is there, for the optimizer renews it."""
        for weight in list(self.coming):
            self._wait(weight)
        del self.way[self.at :]
        self.at = self.until = 0
        self.active.clear()
        self.uses.clear()
        self.offload.partition_all_parameters()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around forwards that are no training step."""
        self.way, self.forwards = self.forwards, self.way
        try:
            yield
        finally:
            self.end_step()
            self.way, self.forwards = self.forwards, self.way

    # ---- hooks ---------------------------------------------------------------------------------------------------------------------------

    def _fetch_at_first_use(self, layer: nn.Module) -> None:
        self.of[layer] = list(layer.parameters())

        def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if layer not in self.active:
                self._fetch(layer)

        layer.register_forward_pre_hook(before)

    def _fetch_around(self, module: nn.Module) -> None:
        """Fetch before forward and backward, release after both. TypeError in the forward pass of one that puts out no single tensor."""
        self.of[module] = list(module.parameters(recurse=False))
        fetch = _going_back(functools.partial(self._fetch, module))
        release = _going_back(functools.partial(self._release, module, back=True))
        shape = _going_back(functools.partial(self._give_shape, module))

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._fetch(module)
            return (release.apply(inputs[0]), *inputs[1:])

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                name = type(module).__name__
                raise TypeError(f"{name} has weights and puts out {type(output).__name__}; under ZeRO-3 it must be one tensor")
            self._release(module)
            # without a gradient for its input, as for an embedding's ids, a module needs no weights on the way back
            return (fetch if inputs[0].requires_grad else shape).apply(output)  # type: ignore[return-value]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    # ---- fetch and release ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fetch(self, module: nn.Module) -> None:
        """A module is about to compute: its weights now, and the next ones on the way while it does."""
        self._reach(module)
        for weight in self.of[module]:
            self._start(weight)
        self._look_ahead(set(self.of[module]))
        for weight in self.of[module]:
            self._wait(weight)

    @torch.no_grad()
    def _release(self, module: nn.Module, *, back: bool = False) -> None:
        """A module has computed. Recomputation ends where the last tensor is there, inside a module: the way back closes that too."""
        num = self.active[module] if back else 1
        self.active[module] -= num
        self._use(module, -num)

    def _give_shape(self, module: nn.Module) -> None:
        """autograd compares a gradient with the shape of its weight, which one that is not there has no more."""
        for weight in self.of[module]:
            self._wait(weight)
            if _is_away(weight):
                weight.data = weight.data.new_empty(1).expand(weight.ds_shape)

    def _reach(self, module: nn.Module) -> None:
        """Go on along the way; from where it differs from the last one it is written anew."""
        if self.at < len(self.way) and self.way[self.at] is not module:
            for ahead in self.way[self.at : self.until]:
                self._use(ahead, -1)
            del self.way[self.at :]
            self.until = self.at
        if self.at == len(self.way):
            self.way.append(module)
        if self.at == self.until:
            self._use(module, 1)
            self.until += 1
        self.at += 1
        self.active[module] += 1

    def _look_ahead(self, now: set[Any]) -> None:
        """Fetch along the way what there is room for beside the weights of `now`."""
        room = self.ahead - sum(weight.ds_numel for weight in {*self.uses, *self.coming} - now)
        for module in self.way[self.until :]:
            room -= sum(weight.ds_numel for weight in self.of[module] if _is_away(weight))
            if room < 0:
                return
            for weight in self.of[module]:
                self._start(weight)
            self._use(module, 1)
            self.until += 1

    def _use(self, module: nn.Module, num: int) -> None:
        """So many uses more, or less, of what comes and goes; without any it goes."""
        for weight in self.of[module]:
            if weight not in self.staying:
                self.uses[weight] += num
                if not self.uses[weight]:
                    del self.uses[weight]
                    self._wait(weight)
                    weight.partition()

    def _start(self, weight: Any) -> None:
        if not _is_away(weight):
            return
        # What comes from other ranks is made where it is used, so that its memory is free again in the order of the computation. Only
        # what comes from the host has a stream of its own: it would be copied between two products.
        stream = self.copying if weight.ds_tensor.device.type == "cpu" else None
        if stream is not None and not self.all_stay:
            stream.wait_stream(torch.cuda.current_stream())  # else weights pile up where copies are faster than the computation
        with _on(stream):
            handle = weight.all_gather_coalesced([weight], quantize=self.quantized)
            self.coming[weight] = handle, None if stream is None else stream.record_event()

    def _wait(self, weight: Any) -> None:
        if weight not in self.coming:
            return
        handle, copied = self.coming.pop(weight)
        if copied is not None:
            copied.synchronize()  # a host that ran ahead would allocate what is not free yet
        with _on(self.idle):  # of one rank alone, DeepSpeed 0.19.8 halts the host until all of the stream is done
            handle.wait()
        if self.idle is not None:
            torch.cuda.current_stream().wait_stream(self.idle)


def _on(stream: Any) -> AbstractContextManager[Any]:
    """As torch.cuda.stream, which looks for the device even where there is no stream, twice for each weight."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _is_away(weight: Any) -> bool:
    return weight.ds_status.name == "NOT_AVAILABLE"  # or INFLIGHT, or AVAILABLE


def choose(sizes: list[int], limits: Limits) -> tuple[int, int]:
    """How many of a stage's weights, from its last one on, stay for a whole step; and how many elements may be there ahead of their use."""
    if sum(sizes) <= limits.live:
        return len(sizes), limits.ahead
    largest = [0, *accumulate(sizes, max)]  # before each weight
    if largest[-1] + limits.ahead > limits.live:
        return 0, max(limits.live - largest[-1], 0)
    stay = taken = 0
    for size, other in zip(reversed(sizes), reversed(largest[:-1]), strict=True):
        taken += size
        if taken + other + limits.ahead > limits.live:
            break
        stay += 1
    return stay, limits.ahead


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
