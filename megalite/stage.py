"""The layers that a rank runs, chunk by chunk, with or without recomputation.

In: layers, built, cut and sharded (engine.py).  Out: a module that zero.py wraps and pipeline.py calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalite import models
from megalite.models.batch import Batch
from megalite.parallel.recompute import KINDS


class Stage(nn.Module):
    """This rank's layers, under the names they have in the whole model; several chunks of them when the schedule is interleaved."""

    def __init__(self, chunks: list[dict[str, nn.Module]], *, recompute: str = "none", recompute_layers: int | None = None) -> None:
        """What blocks keep for the backward pass: everything, what was dear (selective) or their input (full); see `parallel/recompute.py`.

        recompute_layers: only the first so many blocks of a chunk compute again.
        """
        super().__init__()
        for name, part in (item for chunk in chunks for item in chunk.items()):
            models.attach(self, name, part)
        self.orders = [list(chunk) for chunk in chunks]
        self.of_blocks = [[name for name in order if name.startswith("layers.")] for order in self.orders]
        self.recomputed = {name for order in self.of_blocks for name in order[:recompute_layers]} if recompute != "none" else set()
        self.again = KINDS[recompute]

    def in_order(self) -> list[nn.Module]:
        """The layers of all chunks."""
        return [self.get_submodule(name) for order in self.orders for name in order]

    def blocks(self) -> list[nn.Module]:
        """Those of them that are blocks: neither embedding nor head."""
        return [self.get_submodule(name) for order in self.of_blocks for name in order]

    def chunks(self) -> dict[nn.Parameter, int]:
        """Every weight, in order, and the number of its chunk."""
        return {weight: n for n, order in enumerate(self.orders) for name in order for weight in self.get_submodule(name).parameters()}

    def forward(self, x: Tensor, batch: Batch, chunk: int = 0) -> Tensor:
        """Ids (b, s) or a hidden state (b, s, d) in, a hidden state or the parts of the loss out."""
        for name in self.orders[chunk]:
            layer = self.get_submodule(name)
            x = self.again(layer, x, batch) if name in self.recomputed and torch.is_grad_enabled() else layer(x, batch)
        return x
