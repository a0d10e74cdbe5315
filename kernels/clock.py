"""Times of several ways to do the same, measured in turn: round after round, each way once, so that a clock that drifts drifts for all.

In: name -> call. Out: name -> median seconds. On a GPU by its own events, after a warm-up, with the L2 cache written over before each call,
and without the time that launching takes; on a CPU by the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
AHEAD = 4_000_000  # cycles, two milliseconds, that a GPU has nothing to do in: by then the host has launched what is measured


def measure(
    calls: Mapping[str, Call], *, device: torch.device, rounds: int = 15, warm_up: int = 3, required: Sequence[str] = ()
) -> dict[str, float]:
    """Median seconds of each call. A call that cannot run is left out, as peers do not take every shape; one that is `required` raises."""
    able = {name: call for name, call in calls.items() if _runs(call, device, warm_up, may_fail=name not in required)}
    times: dict[str, list[float]] = {name: [] for name in able}
    flush = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    for _ in range(rounds):
        for name, call in able.items():
            flush.zero_()
            times[name].append(_once(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def _runs(call: Call, device: torch.device, times: int, *, may_fail: bool) -> bool:
    try:
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):  # a peer that does not take this shape, dtype or GPU
        if not may_fail:
            raise
        return False
    return True


def _once(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
