"""Bytes a rank sends, by kind of collective: counted as they happen, and by the formulas of the textbook.

In: whatever runs inside `with Traffic()`; or a config.  Out: bytes by kind. A ring over n ranks is the convention, whatever the backend
does: all-gather and reduce-scatter of a tensor send (n - 1)/n of it from every rank, an all-reduce both (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.config import Config
from megalite.parallel.collectives import named

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send")


class Traffic(TorchDispatchMode):
    """Counts c10d operations; every collective of torch.distributed passes through the dispatcher, from the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d":  # in place, as DeepSpeed calls them
            ranks = next((dist.ProcessGroup.unbox(a).size() for a in args if type(a).__name__ == "ScriptObject" and _is_group(a)), 1)
            self._count(name, args, ranks)
        elif func.namespace == "_c10d_functional" and name != "wait_tensor":  # as parallel/collectives.py calls them
            self._count(name, args, named(args[-1]).size())
        elif func.namespace == "megalite" and name == "gathered_linear":  # its inside is not seen
            ranks = named(args[-1]).size()
            self._count("all_gather_into_tensor", args, ranks)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...], ranks: int) -> None:
        share = (ranks - 1) / ranks
        if name in ("allreduce_", "all_reduce"):
            self.sent["all-reduce"] += round(2 * share * _bytes(args[0]))
        elif name in ("_allgather_base_", "allgather_"):  # the whole is an argument
            self.sent["all-gather"] += round(share * _bytes(args[0]))
        elif name == "all_gather_into_tensor":  # this rank's part is
            self.sent["all-gather"] += (ranks - 1) * _bytes(args[0])
        elif name == "_reduce_scatter_base_":
            self.sent["reduce-scatter"] += round(share * _bytes(args[1]))
        elif name == "reduce_scatter_tensor":
            self.sent["reduce-scatter"] += round(share * _bytes(args[0]))
        elif name == "all_to_all_single":
            self.sent["all-to-all"] += round(share * _bytes(args[0]))
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


def expected(config: Config, stage: int, parameters: list[int], whole: list[int]) -> dict[str, tuple[float, float]]:
    """Least and most bytes that all ranks together send in a step, by kind.

    `parameters`: how many each rank's stage has after tensor parallelism cut it; `whole`: how many of them every tensor-parallel rank
    holds alike. The norm and the loss add a few bytes and are left out.
    """
    sent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    most: dict[str, float] = {}
    for part in (_pipeline(config), _tensor(config, stage, sum(whole)), _context(config), _tied(config, stage)):
        for kind, size in part.items():
            sent[kind] += size
    share, width = 1 - 1 / _copies(config), _width(config)
    once = stage < 2 or config.train.reduce == "step"
    weights, gradient = share * sum(parameters) * width, share * sum(parameters) * (4 if once else _microbatches(config) * width)
    if stage == 3:
        sent["reduce-scatter"] += gradient
        # from once a step, where all weights stay live, to once in a forward, a repeated forward and a backward pass each; a weight tied
        # between two layers of one stage is needed by both, an embedding by its forward pass alone
        passes = 2 if config.train.recompute == "none" else 3
        embedding = share * _copies(config) * (config.model.vocab or 0) * config.model.width * width
        twice = embedding * (config.model.tied and config.mesh.pp == 1)
        most["all-gather"] = sent["all-gather"] + _microbatches(config) * (passes * (weights + twice) - (passes - 1) * embedding)
        sent["all-gather"] += weights
    elif stage:  # each rank updates its part, and the new weights are gathered
        sent["reduce-scatter"] += gradient
        sent["all-gather"] += weights
    else:
        sent["all-reduce"] += 2 * gradient
    return {kind: (size, most.get(kind, size)) for kind, size in sent.items()}


def memory(config: Config, stage: int, parameters: int) -> tuple[float, float]:
    """Least and most bytes a rank holds of weights, gradients, master weights and moments; `parameters`: of its stage, cut by tp.

    w bytes a weight, 4 a gradient, 12 for the fp32 weight and both moments (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1, but
    gradients are summed in fp32), each divided by the ranks that share it. ZeRO-3: from no weight gathered to all of them.
    """
    width, shared = _width(config), parameters / _copies(config)
    once = stage < 2 or config.train.reduce == "step"
    states, gradients = 12 * (parameters if stage == 0 else shared), 4 * (parameters if once else shared)
    least = states + gradients + width * (shared if stage == 3 else parameters)
    return least, least + width * parameters * (stage == 3)


def _copies(config: Config) -> int:
    return (config.mesh.dp or 1) * config.mesh.cp


def _width(config: Config) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _microbatches(config: Config) -> int:
    return config.train.global_batch // ((config.mesh.dp or 1) * config.train.micro_batch)


def _hidden(config: Config) -> float:
    """Bytes t of a microbatch's hidden state on one rank, whole over tp."""
    return config.train.micro_batch * config.sequence / config.mesh.cp * config.model.width * _width(config)


def _again(config: Config) -> int:
    """Blocks whose forward pass runs twice."""
    if config.train.recompute != "full":
        return 0
    return min(config.model.layers, config.train.recompute_layers or config.model.layers)  # as tests have it: one chunk, or all of them


def _pipeline(config: Config) -> dict[str, float]:
    """A hidden state at each seam of each pipeline, and its gradient back."""
    mesh, parts = config.mesh, config.mesh.tp if config.train.sequence_parallel else 1
    seams = mesh.pp * config.num_chunks - 1
    return {"send": _copies(config) * mesh.tp * seams * 2 * _microbatches(config) * _hidden(config) / parts}


def _tensor(config: Config, stage: int, whole: int) -> dict[str, float]:
    """A microbatch moves t once in the embedding, 4 times in a block, once in the head, and 3 numbers a token for the loss.

    t is all-reduced, or under sequence parallelism scattered on one way and gathered on the other; a column gathers its input again in
    the backward pass; and the gradients of what is held whole are added up once a step. A block that runs again repeats its forward
    half, but for what comes after the last thing the backward pass asks for: the sum behind the MLP, unless a norm follows it.
    """
    mesh, layers, t = config.mesh, config.model.layers, _hidden(config)
    links = (mesh.tp - 1) * _copies(config) * _microbatches(config)
    repeated = 2 if config.model.family == "bert" else 1
    loss = 2 * links * 3 * t / config.model.width * 4 / _width(config)
    if not config.train.sequence_parallel:
        return {"all-reduce": 2 * links * (4 * layers + 2 + repeated * _again(config)) * t + loss}
    return {
        "all-gather": links * (6 * layers + 3 + 2 * _again(config)) * t,
        "reduce-scatter": links * (4 * layers + 2 + repeated * _again(config)) * t,
        "all-reduce": loss + 2 * (mesh.tp - 1) / mesh.tp * whole * 4 / (1 if stage == 0 else _copies(config)),
    }


def _context(config: Config) -> dict[str, float]:
    """Queries, keys, values and what is mixed of them, to other ranks and back, in both passes."""
    mesh, model = config.mesh, config.model
    keys = model.num_kv_heads // mesh.tp
    keys *= mesh.cp // math.gcd(mesh.cp, keys)
    heads = 2 * model.heads // mesh.tp + 2 * keys
    size = config.train.micro_batch * config.sequence / mesh.cp * heads * model.head_width * _width(config)
    passes = 2 * model.layers + _again(config)
    return {"all-to-all": (mesh.cp - 1) * (config.mesh.dp or 1) * mesh.tp * _microbatches(config) * passes * size}


def _tied(config: Config, stage: int) -> dict[str, float]:
    """A tied weight's gradient, fp32, all-reduced between first and last stage; whole on every copy under ZeRO 0."""
    if not (config.model.tied and config.mesh.pp > 1):
        return {}
    return {"all-reduce": 2 * 4 * (config.model.vocab or 0) * config.model.width * (_copies(config) if stage == 0 else 1)}
