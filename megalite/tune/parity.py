"""The same steps twice: by one process of plain PyTorch, and by a mesh of forked ranks whose pieces are put together again.

In: a small config and a DeepSpeed document.  Out: loss, gradient norm, every gradient (reduced, tied copies summed, not clipped) and every
updated weight of each step, under the names of the whole model; and what each rank held and sent. `verify` and the parity tests compare.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megalite import launch, models, optim
from megalite.config import Config, Model
from megalite.models.batch import Batch
from megalite.tune.traffic import Traffic

Owned = list[tuple[Any, int, Tensor]]  # (cut, start, flat) of every piece of a rank


@dataclass
class Step:
    """One optimizer step, whole tensors."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass
class Answer:
    """What one rank saw: (loss, norm, gradients, weights) of each step, bytes it sent in the last one, bytes it held.

    parameters: of its stage, after tensor parallelism cut it; whole: how many of them tensor parallelism does not cut.
    """

    steps: list[tuple[float, float, Owned, Owned]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    held: int = 0
    parameters: int = 0
    whole: int = 0


def batch_of(config: Config, step: int) -> Batch:
    """The global batch of one step, drawn from its number: the same on every mesh. With data.document_mask, about every fifth token ends a
    document.

    BERT's samples have uneven numbers of targets. In every other step all pairs are random, else none: where some are, the gradient of the
    bias of two elements behind them is a sum of terms of both signs, and cancels to their rounding as soon as it has learned how many are.
    """
    model, size, sequence = config.model, config.train.global_batch, config.sequence
    draw = torch.Generator().manual_seed(1000 + step)
    assert model.vocab is not None
    ids = torch.randint(0, model.vocab, (size, sequence), generator=draw)
    labels = torch.randint(0, model.vocab, ids.shape, generator=draw)
    if model.head != "pretrain":
        return _task_batch(model, ids, draw)
    if model.family == "gpt" and config.data.document_mask:
        ends = torch.rand(ids.shape, generator=draw) < 0.2
        return {"ids": ids, "labels": labels.masked_fill(ends, -100), "documents": ends.cumsum(1) - ends.long()}
    if model.family == "gpt":
        return {"ids": ids, "labels": labels}
    hidden = torch.rand(ids.shape, generator=draw) > 0.2 + 0.2 * torch.rand((size, 1), generator=draw)
    return {
        "ids": ids,
        "labels": labels.masked_fill(hidden, -100),
        "segments": (torch.arange(sequence) >= sequence // 2).long().expand(size, -1).contiguous(),
        "length": torch.randint(sequence // 2, sequence + 1, (size,), generator=draw),
        "next_sentence": torch.full((size,), step % 2),
    }


def _task_batch(model: Model, ids: torch.Tensor, draw: torch.Generator) -> Batch:
    """For a task's head: samples of different lengths that do not count alike."""
    size, sequence = ids.shape
    length = torch.randint(2, sequence + 1, (size,), generator=draw)
    batch = {"ids": ids}
    if model.family == "bert":
        segments = (torch.arange(sequence) >= sequence // 2).long().expand(size, -1).contiguous()
        batch |= {"segments": segments, "length": length}
    if model.head == "tag":
        tags = torch.randint(0, model.labels, ids.shape, generator=draw)
        return batch | {"labels": tags.masked_fill(torch.arange(sequence) >= length[:, None], -100)}
    batch |= {"at": torch.zeros_like(length) if model.family == "bert" else length - 1}
    batch |= {"importance": 0.5 + torch.rand((size,), generator=draw)}
    if model.head == "regress":
        return batch | {"values": torch.randn((size,), generator=draw)}
    return batch | {"classes": torch.randint(0, model.labels, (size,), generator=draw)}


def microbatches(batch: Batch, config: Config, *, dp: int, dp_rank: int) -> list[Batch]:
    """A rank's microbatches of a global batch, as the loader deals them."""
    share, size = config.train.global_batch // dp, config.train.micro_batch
    return [
        {name: value[dp_rank * share + first : dp_rank * share + first + size] for name, value in batch.items()}
        for first in range(0, share, size)
    ]


def reference(config: Config, *, steps: int) -> list[Step]:
    """One process, plain model, plain AdamW, fp32, the whole global batch at once."""
    whole = models.build(config.model, seed=config.run.seed)
    named, settings = dict(whole.named_parameters()), config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": settings.weight_decay * optim.decays(name, tuple(p.shape))} for name, p in named.items()],
        betas=settings.betas,
        eps=settings.eps,
    )
    history = []
    for step in range(steps):
        batch = batch_of(config, step)
        if config.model.dropout or config.model.attention_dropout:
            batch["samples"] = models.sample_keys(torch.arange(len(batch["ids"])), seed=config.run.seed, step=step)
        name, counts = models.weigh(batch)
        batch[name] = counts / counts.sum()
        batch["pair_weights"] = torch.full((config.train.global_batch,), 1 / config.train.global_batch)
        loss = whole(batch).sum()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(whole.parameters(), config.train.clip or float("inf")).item()
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, settings, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        history.append(Step(loss.item(), norm, gradients, {name: p.detach().clone() for name, p in named.items()}))
    return history


def on_mesh(
    config: Config, document: dict[str, Any], *, steps: int, plant: Callable[[], None] | None = None, counted: bool = True
) -> list[Answer]:
    """The same steps on forked ranks of config.mesh; `plant` runs on every rank first and may break something, for tests.

    Bytes are counted where every operator passes, a tenth of such a step: not `counted`, there are none.
    """
    work = functools.partial(train_rank, config=config, document=document, steps=steps, plant=plant, counted=counted)
    return launch.run_ranks(config.mesh.world, work, warm=("megalite.engine", functools.partial(_check, document)))


def _check(document: dict[str, Any]) -> None:
    from megalite.parallel import zero  # DeepSpeed takes seconds to import

    zero.check(document)


def train_rank(
    rank: int,
    *,
    config: Config,
    document: dict[str, Any],
    steps: int,
    device: str = "cpu",
    plant: Callable[[], None] | None = None,
    counted: bool = True,
) -> Answer:
    """What a rank of `on_mesh` does."""
    if plant is not None:
        plant()
    engine, answer = start_engine(config, document, device=device), Answer()
    if engine.zero.scale:
        engine.zero.scale.value = 256.0  # no gradient of so small a model overflows: a skipped step is no step of one process
    cuts = [parameter.cut for parameter in _whole_parameters(engine)]
    answer.parameters = sum(math.prod(cut.local_shape) for cut in cuts)
    answer.whole = sum(math.prod(cut.shape) for cut in cuts if cut.dim is None)
    gradients: list[Owned] = []

    def look(pieces: list[Any]) -> None:
        gradients.append([(piece.cut, piece.start, piece.gradient.clone()) for piece in pieces])
        answer.held = max(answer.held, _held(engine, pieces))

    engine.zero.before_update = look
    for step in range(steps):
        mine = microbatches(batch_of(config, step), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
        with Traffic() if counted else contextlib.nullcontext() as traffic:
            report = engine.step(step, mine)
        answer.sent = traffic.sent if traffic else Counter()
        answer.steps.append((report.loss, report.grad_norm, gradients.pop(), masters(engine)))
    return answer


def start_engine(config: Config, document: dict[str, Any], *, device: str = "cpu") -> Any:
    """The engine of this rank; imported here, since DeepSpeed takes seconds."""
    from megalite.engine import Engine
    from megalite.mesh import Mesh

    mesh = Mesh.start(**config.mesh.degrees, device=torch.device(device))
    return Engine(config, mesh, document=document)


def masters(engine: Any) -> Owned:
    """A copy of the master weights this rank owns."""
    return [(piece.cut, piece.start, piece.master.clone()) for piece in engine.zero.pieces()]


def _whole_parameters(engine: Any) -> Iterable[Any]:
    return {id(p): p for p in engine.zero.engine.module.parameters()}.values()


def _held(engine: Any, pieces: list[Any]) -> int:
    """Bytes of weights, gradients, master weights and moments this rank holds between reduction and update, each storage once.

    With ZeRO-3 the weights that are gathered at this moment count too.
    """
    tensors: list[Tensor] = []
    for parameter in _whole_parameters(engine):
        tensors += [parameter.data, *([parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else [])]
        tensors += [parameter.grad] if parameter.grad is not None else []
    for piece in pieces:
        tensors += [piece.master, piece.gradient, *piece.moments.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def assemble(answers: list[Answer], *, steps: int) -> list[Step]:
    """Whole gradients and weights of every step; all ranks must say the same loss and norm."""
    history = []
    for step in range(steps):
        losses, norms = {answer.steps[step][0] for answer in answers}, {answer.steps[step][1] for answer in answers}
        if len(losses) > 1 or len(norms) > 1:
            raise AssertionError(f"ranks disagree in step {step}: losses {sorted(losses)}, gradient norms {sorted(norms)}")
        gradients = put_together([answer.steps[step][2] for answer in answers])
        weights = put_together([answer.steps[step][3] for answer in answers])
        history.append(Step(losses.pop(), norms.pop(), gradients, weights))
    return history


def put_together(owned: list[Owned]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of every rank. Copies (tp, ZeRO 0, both ends of a tie) must be equal bit for bit."""
    whole: dict[str, Tensor] = {}
    for cut, start, flat in (piece for pieces in owned for piece in pieces):
        full = whole.setdefault(cut.name, torch.full(cut.shape, float("nan")))
        for block in cut.rectangles(start, start + flat.numel()):
            place = full[tuple(slice(o, o + n) for o, n in zip(block.offsets, block.sizes, strict=True))]
            values = flat[block.start - start : block.stop - start].view(block.sizes)
            known = ~place.isnan()
            if not torch.equal(place[known], values[known]):
                raise AssertionError(f"copies of {cut.name} differ between ranks")
            place.copy_(values)
    return whole


def difference(ours: Tensor, theirs: Tensor, *, least: float = 1e-30) -> float:
    """max |a - b| / max |b|, or / `least` where all of b is smaller than that; infinite where a part of a is owned by no rank."""
    if ours.shape != theirs.shape or bool(ours.isnan().any()):
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)).item()
