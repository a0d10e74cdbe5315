"""What a block keeps for its backward pass, and what it computes again. No random state: dropout is a function, it drops the same again.

In: a layer and its input.  Out: its output. full keeps the input alone (Chen et al. 2016, arXiv:1604.06174). selective keeps what was
dear, the results of matrix products, of attention and of collectives, and computes norms, activations, rotations and dropout again
(the policy of torchtitan; the idea is that of Korthikanti et al. 2022, arXiv:2205.05198, section 5).
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch
from megalite_kernels import operators  # pyright: ignore[reportMissingImports]  # noqa: F401  registers attention_forward
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from megalite.parallel import tensor  # noqa: F401  registers gathered_linear

aten, links = torch.ops.aten, torch.ops._c10d_functional
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    links.all_reduce.default,
    links.reduce_scatter_tensor.default,
    links.all_to_all_single.default,
    torch.ops.megalite.gathered_linear.default,
    torch.ops.megalite.attention_forward.default,
}


class _Keep(TorchDispatchMode):
    """In the forward pass: remembers what the operations of KEPT put out."""

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in KEPT:
            self.kept[func].append(tree_map_only(Tensor, Tensor.detach, found))
        return found


class _Recall(TorchDispatchMode):
    """When the layer runs again: gives back what was kept, in the same order, and computes the rest."""

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self.kept[func].popleft() if func in KEPT else func(*args, **(kwargs or {}))


def _contexts() -> tuple[_Keep, _Recall]:
    """torch's own (2.13) counts every operation and fails where the second run has others: under ZeRO-3 one run gathers weights and the
    other may find them there.
    """
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Recall(kept)


def run(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Keep everything."""
    return layer(x, batch)


def run_full(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return checkpoint(layer, x, batch, use_reentrant=False, preserve_rng_state=False)


def run_selective(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return checkpoint(layer, x, batch, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


KINDS = {"none": run, "full": run_full, "selective": run_selective}
