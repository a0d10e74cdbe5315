"""Bytes a rank sends, by kind of collective: counted as they happen, and by the formulas of the textbook.

In: whatever runs inside `with Traffic()`; or a config.  Out: bytes by kind. A ring over n ranks is the convention, whatever the backend
does: all-gather and reduce-scatter of a tensor send (n - 1)/n of it from every rank, an all-reduce both (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.config import Config

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "send")


class Traffic(TorchDispatchMode):
    """Counts c10d operations; every collective of torch.distributed passes through the dispatcher, from the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        ranks = next((dist.ProcessGroup.unbox(a).size() for a in args if type(a).__name__ == "ScriptObject" and _is_group(a)), 1)
        share = (ranks - 1) / ranks
        if name == "allreduce_":
            self.sent["all-reduce"] += round(2 * share * _bytes(args[0]))
        elif name in ("_allgather_base_", "allgather_"):
            self.sent["all-gather"] += round(share * _bytes(args[0]))
        elif name == "_reduce_scatter_base_":
            self.sent["reduce-scatter"] += round(share * _bytes(args[1]))
        elif name == "send":
            self.sent["send"] += _bytes(args[0])


def _is_group(value: Any) -> bool:
    try:
        dist.ProcessGroup.unbox(value)
    except (RuntimeError, ValueError):
        return False
    return True


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def expected(config: Config, stage: int, parameters: list[int]) -> dict[str, tuple[float, float]]:
    """Least and most bytes that all ranks together send in a step, by kind; `parameters`: how many each rank's shard of its stage has.

        send            2 m t at each of the pp x chunks - 1 seams of each of the dp x tp pipelines, t = b s d numbers
        all-reduce, tp  a microbatch: t once in the embedding, 4 times in a block, once in the head; 3 b s numbers for the loss
        gradients       ZeRO 0, 1: N once, all-reduced; ZeRO 2: N a reduction, all-reduced; ZeRO 3: N a reduction, reduce-scattered
        weights         ZeRO 1, 2: N gathered after the step; ZeRO 3: from once a step (all stay live) to 3 times a microbatch (none does)

        tied weights    v d numbers in fp32, all-reduced between first and last stage (whole on every dp rank under ZeRO 0)

    N are a rank's parameters, m the microbatches of a rank. The norm and the loss add a few bytes and are left out.
    """
    mesh, train, model = config.mesh, config.train, config.model
    dp, width = mesh.dp or 1, 2 if train.precision == "bf16" else 4
    m = train.global_batch // (dp * train.micro_batch)
    tokens = train.micro_batch * (config.data.sequence or model.sequence)
    t = tokens * model.width * width
    send = dp * mesh.tp * (mesh.pp * config.num_chunks - 1) * 2 * m * t
    reduced = 2 * (mesh.tp - 1) * dp * m * ((4 * model.layers + 2) * t + 3 * tokens * 4)
    rounds = m if stage >= 2 and train.reduce != "step" else 1
    numbers, share = sum(parameters), (dp - 1) / dp
    gradient = share * numbers * rounds * (4 if stage < 2 else width)
    if model.tied and mesh.pp > 1:
        reduced += 2 * 4 * (model.vocab or 0) * model.width * (dp if stage == 0 else 1)
    found = {"send": (send, send), "all-reduce": (reduced, reduced), "reduce-scatter": (0.0, 0.0), "all-gather": (0.0, 0.0)}
    if stage == 3:
        found["reduce-scatter"] = (gradient, gradient)
        found["all-gather"] = (share * numbers * width, 3 * m * share * numbers * width)
    else:
        total = reduced + 2 * gradient
        found["all-reduce"] = (total, total)
        if stage:
            found["all-gather"] = (share * numbers * width,) * 2
    return found
