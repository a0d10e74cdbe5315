"""Dry run: the real models, our parallel layers and the real DeepSpeed engine, for one rank of any world, without memory and without a GPU.

In: a run config, its DeepSpeed document, a rank.  Out: what that rank would hold at most while it is built and in a step (and which lines
of code own it), the FLOPs it computes and every collective it calls. Fake tensors have shapes and no data (parallel/pretend.py); the books
are those of a real run (ledger.py), and a test compares them with real ranks, byte for byte.

On the fake GPU, attention goes through our kernels' operators (kernels/operators.py): queries, keys, values, the result and one number a
row are kept, and with dropout the numbers that say what is dropped. So does the loss (kernels/cross_entropy.py): the logits are kept,
unless it is made in pieces. So does the dropout of features (kernels/dropout.py), which keeps nothing.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megalite import launch
from megalite.config import Config
from megalite.tune.ledger import Ledger
from megalite.tune.parity import batch_of, microbatches

FUSED = ("attention", "cross_entropy", "dropout")  # modules of the kernels that ask for a GPU
STEPS = 3  # ZeRO-3 records what it needs in the first step and fetches ahead from the next one on


@dataclass
class Trace:
    """The books of one rank, in bytes by kind of device: cpu, or fakegpu and cpu beside it."""

    rank: int
    start_up: Counter[str] = field(default_factory=Counter)  # peak while the engine is built
    peak: Counter[str] = field(default_factory=Counter)  # of the steps
    steady: Counter[str] = field(default_factory=Counter)  # between two steps
    owners: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # of the peak, the largest first
    flops: int = 0  # of the last step
    sent: list[tuple[str, int, int]] = field(default_factory=list)  # collectives of the last step: kind, ranks, bytes


def trace(config: Config, document: dict[str, Any], *, rank: int, gpu: bool = True, owners: bool = True) -> Trace:
    """Of one rank of config.mesh, in a process of its own."""
    work = functools.partial(_pretend, config=config, document=document, rank=rank, gpu=gpu, owners=owners)
    warm = () if gpu else ("megalite.engine",)  # with the fake GPU, DeepSpeed must not be imported before there is one
    return launch.run_ranks(1, work, warm=warm)[0]


def _pretend(_: int, *, config: Config, document: dict[str, Any], rank: int, gpu: bool, owners: bool) -> Trace:
    from megalite.parallel import pretend

    device = pretend.join(rank, config.mesh.world, gpu=gpu)
    if gpu:
        _compute_as_on_a_gpu()
    mesh = _mesh(config, device)
    with pretend.pretending():
        return walk(config, document, mesh=mesh, owners=owners)


def real(rank: int, *, config: Config, document: dict[str, Any]) -> Trace:
    """The same books of a rank that is really there, whose collectives are over when they were waited for."""
    from megalite.parallel import pretend

    pretend.let_go_when_waited_for()
    return walk(config, document, mesh=_mesh(config, torch.device("cpu")), owners=False)


def _mesh(config: Config, device: torch.device) -> Any:
    from megalite.mesh import Mesh

    return Mesh.start(**config.mesh.degrees, device=device)


def walk(config: Config, document: dict[str, Any], *, mesh: Any, owners: bool) -> Trace:
    """Build the engine and take a few steps, with the books open."""
    from megalite.engine import Engine

    found = Trace(mesh.rank)
    with Ledger(owners=owners) as ledger:
        engine = Engine(config, mesh, document=document)
        found.start_up = Counter(ledger.peak)
        for step in range(STEPS):
            mine = microbatches(batch_of(config, step), config, dp=mesh.dp, dp_rank=mesh.dp_rank)
            ledger.flops, ledger.sent = 0, []
            if step:
                ledger.restart()
            engine.step(step, mine)
            del mine
            for device, size in ledger.peak.items():
                if size > found.peak[device]:
                    found.peak[device] = size
                    found.owners[device] = ledger.owned_at_peak.get(device, Counter()).most_common()
        found.steady, found.flops = Counter(ledger.alive), ledger.flops
        found.sent = [(sent.kind, sent.ranks, sent.size) for sent in ledger.sent]
    return found


def _compute_as_on_a_gpu() -> None:
    """Attention and loss go through the operators of our kernels, which know what they put out; the kernels themselves are never called."""
    found = ("megalite.models.attention", "megalite.models.layers", *(f"megalite_kernels.{name}" for name in FUSED))
    attention, layers, kernels, rows, dropout = (importlib.import_module(name) for name in found)
    attention.is_fused = lambda q, *, dropout=False: True  # type: ignore[attr-defined]
    layers.has_fused_loss = lambda x: True  # type: ignore[attr-defined]
    kernels.why_not_triton = rows._why_not = dropout._why_not = lambda *_: None  # type: ignore[attr-defined]
    functional.rms_norm, functional.silu = _rms_norm, _silu


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One operation, as on CUDA; elsewhere PyTorch takes it apart and keeps more."""
    return _RmsNorm.apply(x, weight)  # type: ignore[return-value]


def _silu(x: Tensor) -> Tensor:
    """One operation there and back, as on CUDA; elsewhere the way back is taken apart and holds more."""
    return _Silu.apply(x)  # type: ignore[return-value]


class _Silu(torch.autograd.Function):
    """Shapes alone: keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _RmsNorm(torch.autograd.Function):
    """Shapes alone: keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
