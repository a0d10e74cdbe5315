"""What a block keeps for its backward pass, and what it computes again. No random state: dropout is a function, it drops the same again.

In: a layer and its input.  Out: its output. full keeps the input alone (Chen et al. 2016, arXiv:1604.06174). selective keeps what was
dear, the results of matrix products, of attention and of collectives, and computes norms, activations, rotations and dropout again
(the policy of torchtitan; the idea is that of Korthikanti et al. 2022, arXiv:2205.05198, section 5).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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
}


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Keep everything."""
    return layer(x, batch)


def run_full(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return checkpoint(layer, x, batch, use_reentrant=False, preserve_rng_state=False)


def run_selective(layer: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer, x, batch, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


KINDS = {"none": run, "full": run_full, "selective": run_selective}
