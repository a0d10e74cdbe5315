"""Which attention weights dropout keeps: a function of (seed, offset, sequence and head, row, key), the same in every kernel.

A Philox block (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") gives each row and each key of a head one 32-bit number.
The draw of a pair is those two, combined and scrambled by lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/). So a head
of s rows and n keys costs s + n Philox draws instead of s n, and a tile can be drawn in any shape and either way up. This is the PyTorch
form; tiles.py holds the same in Triton.

Shapes: b batch, h heads, s query rows, n keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
ROWS, KEYS = 0, 1  # the side a number is drawn for
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox 4x32
WEYL = (0x9E3779B9, 0xBB67AE85)
SCRAMBLE = (0x7FEB352D, 0x846CA68B)  # lowbias32


def draw_seed(device: torch.device) -> Tensor:
    """(seed, offset) from torch's generator of the device, (2,) int64 on it: what torch.manual_seed and checkpointing restore."""
    return torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=device)


def limit_of(dropout_p: float) -> int:
    """Draws of 31 bits below this are dropped."""
    return int(dropout_p * 2**31)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low half of a 32 x 32 bit product, without leaving 63 bits."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (a * b) & LOW


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], *, rounds: int = 10) -> Tensor:
    """The first 32 bits of Philox 4x32 for a 64-bit seed and four 32-bit counters, all int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(rounds):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high2, low2 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0


def _numbers(rng: Tensor, heads: int, count: int, side: int) -> Tensor:
    """(b h, count): the numbers of one side."""
    head = torch.arange(heads, device=rng.device)[:, None]
    place = torch.arange(count, device=rng.device)[None]
    zero = torch.zeros_like(head + place)
    return philox(rng[0], (place + zero, head + zero, (rng[1] & LOW) + zero, side + zero))


def kept(rng: Tensor, *, shape: Sequence[int], dropout_p: float) -> Tensor:
    """(b, h, s, n) bool: the weights that dropout with probability dropout_p leaves; rng is (seed, offset)."""
    b, h, s, n = shape
    x = _numbers(rng, b * h, s, ROWS)[:, :, None] ^ _numbers(rng, b * h, n, KEYS)[:, None, :]
    x = ((x ^ (x >> 16)) * SCRAMBLE[0]) & LOW
    x = ((x ^ (x >> 15)) * SCRAMBLE[1]) & LOW
    x = x ^ (x >> 16)
    return ((x >> 1) >= limit_of(dropout_p)).reshape(shape)
