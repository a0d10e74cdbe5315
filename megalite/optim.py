"""Learning rate and weight decay: which of each a step and a parameter get. Plain arithmetic and stateless, so resuming takes one integer.

In: `config.Optimizer`, the step counted from 0, the number of steps; a parameter's name and global shape.  Out: numbers for AdamW
(Loshchilov and Hutter 2019, arXiv:1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from megalite.config import Optimizer

Weight = TypeVar("Weight")


def learning_rate(step: int, optimizer: Optimizer, steps: int) -> float:
    """Learning rate of step 0 .. steps - 1; with w = warmup, m = min_lr, t = (step - w) / (steps - w):

        step < w    lr (step + 1) / w                           so step 0 already learns, and step w - 1 is at the peak
        cosine      lr (m + (1 - m) (1 + cos(pi t)) / 2)        Loshchilov and Hutter 2017, arXiv:1608.03983
        linear      lr (m + (1 - m) (1 - t))                    as BERT was trained
        wsd         lr, then linear over the last decay_fraction of all steps; Hu et al. 2024, arXiv:2404.06395
        constant    lr

    The end, lr m, is reached at `steps`, one after the last step, so no step is wasted when m is 0; later steps stay there.
    """
    peak, warmup = optimizer.lr, optimizer.warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return peak
    start = warmup
    if optimizer.schedule == "wsd":
        start = max(warmup, steps - round(optimizer.decay_fraction * steps))
    if step >= steps:
        left = 0.0
    elif step < start:
        left = 1.0
    else:
        left = 1 - (step - start) / (steps - start)
    if optimizer.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return peak * (optimizer.min_lr + (1 - optimizer.min_lr) * left)


def runs(layers: Iterable[list[Weight]], most: int, *, size: Callable[[Weight], int]) -> list[list[Weight]]:
    """The weights of neighbouring layers, in their order, in runs of at most `most` elements; of a larger layer each weight alone."""
    found: list[list[Weight]] = []
    room = 0
    for layer in layers:
        whole = sum(map(size, layer))
        if whole > most:
            found += [[weight] for weight in layer]
            room = 0
            continue
        if whole > room or not found:
            found.append([])
            room = most
        found[-1] += layer
        room -= whole
    return found


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether AdamW decays this parameter: matrices and embeddings, which have two dims; never biases and norms, which have one.

    `shape` is that of the whole tensor: what ZeRO holds of it is flat. The name adds that a bias stays a bias when it is stacked.
    """
    return len(shape) >= 2 and not name.endswith(".bias")
