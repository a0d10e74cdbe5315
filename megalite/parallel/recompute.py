"""What a block keeps for its backward pass, and what it computes again. No random state: dropout is a function, it drops the same again.

In: a layer and its input.  Out: its output. full keeps the input alone (Chen et al. 2016, arXiv:1604.06174). selective keeps what was
dear, the results of matrix products, of attention and of collectives, and computes norms, activations, rotations and dropout again
(the policy of torchtitan; the idea is that of Korthikanti et al. 2022, arXiv:2205.05198, section 5); but of what was dear no more than the
second run needs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megalite_kernels import operators  # pyright: ignore[reportMissingImports]  # noqa: F401  registers attention_forward
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from megalite.parallel import tensor  # noqa: F401  registers gathered_linear

aten, links = torch.ops.aten, torch.ops._c10d_functional
SENT = {links.all_reduce.default, links.reduce_scatter_tensor.default, links.all_to_all_single.default}
KEPT = SENT | {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.megalite.gathered_linear.default,
    torch.ops.megalite.attention_forward.default,
}


class _Keep(TorchDispatchMode):
    """In the forward pass: remembers what the operations of KEPT put out, if anything that autograd saves is made of it.

    Nobody asks for a product that is only summed over ranks, or for the layer's last one, when the layer runs again: of such a result the
    shape is enough.
    """

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.asked, self.dropped = 0, 0  # a bit for each of `kept`
        self.made_of: dict[int, int] = {}  # by storage, the same bits

    def __enter__(self) -> _Keep:
        # torch's checkpoint has no public way to see what is saved
        save, give = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
        self.hooks = saved_tensors_hooks(partial(self._note, save), give)
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.hooks.__exit__(*raised)
        del self.hooks  # it knows this object, and both would wait for Python's garbage collector, the layer's input with them
        self._drop(~self.asked)

    def _note(self, save: Callable[[Tensor], Any], saved: Tensor) -> Any:
        asked = self.made_of.get(_storage(saved), 0)
        assert not asked & self.dropped, "autograd saves what is made of a result that had gone to other ranks alone"
        self.asked |= asked
        return save(saved)

    def _drop(self, unasked: int) -> None:
        self.dropped |= unasked
        for number, (func, results) in enumerate(self.kept):
            if unasked >> number & 1:
                self.kept[number] = func, tree_map_only(Tensor, _Shape, results)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view:  # of a storage that is known
            return found
        made_of = 0
        for place in _storages((args, kwargs) if kwargs else args):
            made_of |= self.made_of.get(place, 0)
        if func in SENT:
            self._drop(made_of & ~self.asked)  # what goes to other ranks goes nowhere else
        if func in KEPT:
            made_of = 1 << len(self.kept)
            self.kept.append((func, tree_map_only(Tensor, Tensor.detach, found)))
        for place in _storages((found,)):
            self.made_of[place] = made_of
        return found


class _Recall(TorchDispatchMode):
    """When the layer runs again: gives back what was kept, in the same order, and computes the rest."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in KEPT:
            return func(*args, **(kwargs or {}))
        before, results = self.kept.popleft()
        assert func is before, f"a layer that ran {before} runs {func} when it is computed again"
        return tree_map_only(_Shape, _Shape.stand_in, results)


class _Shape:
    """Of a result that nobody asks for. What stands in for it is not a number, lest somebody does."""

    def __init__(self, result: Tensor) -> None:
        self.shape, self.like = result.shape, {"dtype": result.dtype, "device": result.device}

    def stand_in(self) -> Tensor:
        return torch.full((), math.nan, **self.like).expand(self.shape)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _storages(values: Iterable[Any]) -> Iterator[int]:
    """Of the tensors in there; written out, for this is passed by every operation."""
    for each in values:
        if isinstance(each, Tensor):
            yield each.untyped_storage()._cdata
        elif isinstance(each, (tuple, list)):
            yield from _storages(each)
        elif isinstance(each, dict):
            yield from _storages(each.values())


def _contexts() -> tuple[_Keep, _Recall]:
    """torch's own (2.13) counts every operation and fails where the second run has others: under ZeRO-3 one run gathers weights and the
    other may find them there.
    """
    kept: deque[Any] = deque()
    return _Keep(kept), _Recall(kept)


def run(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Keep everything."""
    return layer(x, batch)


@contextmanager
def _weights_as_they_are() -> Iterator[None]:
    """torch's checkpoint (2.13) saves what is detached of a tensor, also of weights. ZeRO-3's come and go: of a layer that had run again,
    all were there until each had gone back, beside those that were gathered for it, whatever the limit.
    """
    save, give = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]

    def pack(saved: Tensor) -> Any:
        return saved if isinstance(saved, nn.Parameter) else (save(saved),)

    with saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, nn.Parameter) else give(packed[0])):
        yield


def _run_again(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    with _weights_as_they_are():
        return layer(x, batch)


def run_full(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return checkpoint(_run_again, layer, x, batch, use_reentrant=False, preserve_rng_state=False)


def run_selective(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return checkpoint(_run_again, layer, x, batch, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


KINDS = {"none": run, "full": run_full, "selective": run_selective}
