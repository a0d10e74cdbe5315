"""Dropout whose mask is a function of (seed, step, sample, place, feature) alone.

In: a hidden state and the microbatch, which carries a key for every sample in training (and none in validation: nothing is dropped).
Out: the same numbers on every mesh, in every recomputation and after every resume; ranks that hold copies drop the same, ranks that hold
other parts of a tensor drop what one process would drop there. No state is kept, so none is saved.

A row of features is a stream of bits of its own (`dropout.py` of the kernels). Attention's weights are too many for that: a row and a key
of a head have a number each, and both say whether the weight is kept (`randomness.py` there).
"""

from __future__ import annotations

import hashlib

import torch
from megalite_kernels import dropout  # pyright: ignore[reportMissingImports]
from megalite_kernels.randomness import GOLDEN, mix  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from megalite.models.batch import Batch


class Dropout(nn.Module):
    """Zeroes a share `rate` of x and scales up the rest, and adds the residual, if there is one: (b, s, d) -> (b, s, d). `site` tells it
    from others, see `name_sites`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.site = rate, 0

    def forward(self, x: Tensor, batch: Batch, residual: Tensor | None = None) -> Tensor:
        if self.rate == 0 or "samples" not in batch:
            return x if residual is None else residual + x
        places = batch.get("places", torch.arange(x.shape[1], device=x.device))  # (b, s) or (s,): where these rows stand in their samples
        return dropout(x, batch["samples"], places, site=self.site, rate=self.rate, residual=residual)


def name_sites(root: nn.Module, prefix: str = "") -> None:
    """Give every module that drops something a number made of its name in the whole model, so that no two drop alike.

    `prefix` is the name of `root` itself where it is a part of the model.
    """
    for name, module in root.named_modules(prefix=prefix):
        if hasattr(module, "site"):
            module.site = _number(name)  # type: ignore[assignment]


def sample_keys(samples: Tensor, *, seed: int, step: int) -> Tensor:
    """A key for each sample of step `step`, by its number in the global batch: (b,) -> (b,), int64."""
    return mix(_number(f"{seed}/{step}") + samples * GOLDEN)


def _number(text: str) -> int:
    """64 bits of a text, as the signed integer torch knows."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
