"""Which attention weights dropout keeps: a function of one 32-bit number a row and one a key of every head, the same in every kernel; and
the streams that the dropout of features is drawn from (dropout.py).

The draw of a pair is those two, combined and scrambled by lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/). So a head
of s rows and n keys costs s + n numbers, drawn before the kernel, instead of s n inside it, and a tile can be drawn in any shape and
either way up. The numbers come from torch's generator, or from whoever wants the same mask in every layout. This is the PyTorch form;
tiles.py holds the same in Triton.

Shapes: b batch, h heads, s query rows, n keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9e3779b97f4a7c15, as the signed integer torch knows
LOW = 0xFFFFFFFF
SCRAMBLE = (0x7FEB352D, 0x846CA68B)  # lowbias32


class Draws(NamedTuple):
    """int32, every value alike likely: rows (b, h, s) and keys (b, h, n)."""

    rows: Tensor
    keys: Tensor


def draw(b: int, h: int, s: int, n: int, *, device: torch.device) -> Draws:
    """Numbers from torch's generator of the device: what torch.manual_seed and checkpointing restore."""
    whole = torch.randint(-(2**31), 2**31, (b, h, s + n), dtype=torch.int32, device=device)
    return Draws(whole[..., :s], whole[..., s:])


def limit_of(dropout_p: float) -> int:
    """Draws of 31 bits below this are dropped."""
    return int(dropout_p * 2**31)


def kept(draws: Draws, *, dropout_p: float) -> Tensor:
    """(b, h, s, n) bool: the weights that dropout with probability dropout_p leaves."""
    x = (draws.rows[..., :, None] ^ draws.keys[..., None, :]).long() & LOW
    x = ((x ^ (x >> 16)) * SCRAMBLE[0]) & LOW
    x = ((x ^ (x >> 15)) * SCRAMBLE[1]) & LOW
    x = x ^ (x >> 16)
    return (x >> 1) >= limit_of(dropout_p)


def streams(samples: Tensor, places: Tensor, *, site: int) -> Tensor:
    """The seed of every row's stream, from the keys of the samples and the rows' places, which are broadcast; int64."""
    return mix(mix(samples + site) + places * GOLDEN)


def sides(samples: Tensor, heads: Tensor, length: int, *, site: int) -> Draws:
    """A number for every row and every key of the heads, from the keys of the samples (b,), the heads' numbers in the whole model (h,) and
    the places 0 .. length - 1.
    """
    places = (heads[:, None] << 32) + torch.arange(length, device=samples.device)
    both = (streams(samples[:, None, None], places, site=which) for which in (site, ~site))
    return Draws(*(side.view(torch.int32)[..., ::2] for side in both))  # the lower half of each: (b, h, length)


def mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64; int64 wraps around, and shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -7723592293110705685  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)
