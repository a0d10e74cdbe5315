"""Dropout whose mask is a function of (seed, step, sample, place, feature) alone.

In: a hidden state and the microbatch, which carries a key for every sample in training (and none in validation: nothing is dropped).
Out: the same numbers on every mesh, in every recomputation and after every resume; ranks that hold copies drop the same, ranks that hold
other parts of a tensor drop what one process would drop there. No state is kept, so none is saved.

The bits are those of splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195): a row of features is a stream of its own,
seeded by a mix of everything but the feature; each 64-bit output serves four features with 16 bits each. Attention's weights are
too many for that: a row and a key of a head have a number each, and both say whether the weight is kept (`randomness.py` of the kernels).
"""

from __future__ import annotations

import hashlib

import torch
from megalite_kernels.randomness import Draws  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from megalite.models.batch import Batch

GOLDEN = -7046029254386353131  # 0x9e3779b97f4a7c15, as the signed integer torch knows


class Dropout(nn.Module):
    """Zeroes a share `rate` of x and scales up the rest: (b, s, d) -> (b, s, d). `site` tells it from others, see `name_sites`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.site = rate, 0

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.rate == 0 or "samples" not in batch:
            return x
        places = batch.get("places", torch.arange(x.shape[1], device=x.device))  # (b, s) or (s,): where these rows stand in their samples
        return drop(x, streams(batch["samples"][:, None], places, site=self.site), self.rate)


def name_sites(root: nn.Module, prefix: str = "") -> None:
    """Give every module that drops something a number made of its name in the whole model, so that no two drop alike.

    `prefix` is the name of `root` itself where it is a part of the model.
    """
    for name, module in root.named_modules(prefix=prefix):
        if hasattr(module, "site"):
            module.site = _number(name)  # type: ignore[assignment]


def sample_keys(samples: Tensor, *, seed: int, step: int) -> Tensor:
    """A key for each sample of step `step`, by its number in the global batch: (b,) -> (b,), int64."""
    return _mix(_number(f"{seed}/{step}") + samples * GOLDEN)


def streams(samples: Tensor, places: Tensor, *, site: int) -> Tensor:
    """The seed of every row's stream, from the keys of the samples and the rows' places, which are broadcast; int64."""
    return _mix(_mix(samples + site) + places * GOLDEN)


def drop(x: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """Zero a share `rate` of x (..., d) and scale the rest by its inverse; seeds (...). The rate is rounded to a multiple of 2^-16."""
    dropped = round(rate * 65536)
    counters = torch.arange(1, (x.shape[-1] + 3) // 4 + 1, device=x.device) * GOLDEN
    bits = _mix(seeds.unsqueeze(-1) + counters).view(torch.int16)[..., : x.shape[-1]]
    return torch.where(bits >= dropped - 32768, x * (65536 / (65536 - dropped)), 0)


def draws(samples: Tensor, heads: Tensor, length: int, *, site: int) -> Draws:
    """What attention's dropout draws from: a 32-bit number for every row and every key of the heads, by their numbers in the whole model.

    samples (b,) are the samples' keys, heads (h,); rows and keys stand at 0 .. length - 1.
    """
    places = (heads[:, None] << 32) + torch.arange(length, device=samples.device)
    sides = (streams(samples[:, None, None], places, site=which) for which in (site, ~site))
    return Draws(*(side.view(torch.int32)[..., ::2] for side in sides))  # the lower half of each: (b, h, length)


def _number(text: str) -> int:
    """64 bits of a text, as the signed integer torch knows."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64; int64 wraps around, and shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -7723592293110705685  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)
