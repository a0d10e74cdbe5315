"""Which layers a pipeline stage runs: contiguous ranges, balanced by cost. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence


def assign(costs: Sequence[float], num: int) -> list[range]:
    """Cut layers into `num` contiguous non-empty ranges so that the dearest range is as cheap as it can be.

    Dynamic programming over (layers, ranges); of equal optima the one whose squared costs are smallest, so that the rest is even too.
    """
    assert 1 <= num <= len(costs), f"{len(costs)} layers cannot make {num} stages"
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[list[tuple[float, float, int]]] = [[(math.inf, math.inf, 0)] * (len(costs) + 1) for _ in range(num + 1)]
    best[0][0] = (0.0, 0.0, 0)
    for parts in range(1, num + 1):
        for stop in range(parts, len(costs) + 1):
            best[parts][stop] = min(
                (max(dearest, sums[stop] - sums[start]), squares + (sums[stop] - sums[start]) ** 2, start)
                for start in range(parts - 1, stop)
                for dearest, squares, _ in [best[parts - 1][start]]
            )
    ranges, stop = [], len(costs)
    for parts in range(num, 0, -1):
        start = best[parts][stop][2]
        ranges.append(range(start, stop))
        stop = start
    return ranges[::-1]
