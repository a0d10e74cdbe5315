"""The question all parity tests ask: does this mesh compute what one process of plain PyTorch computes?

`reference` trains the plain model with plain AdamW; `on_mesh` trains it on forked ranks and puts every gradient and weight together
again from the pieces the ranks own. `assert_same` compares loss, gradient norm, every gradient and every updated weight, step by step.

The measure is max |a - b| / max |b| of a tensor: relative to the largest element, because a gradient holds many numbers that cancel to
nearly nothing, whose own relative error says only how they cancelled. Adam's eps is 1e-3, not 1e-8: the gradient of a key's bias is 0 by
construction (softmax does not see a shift), and with a tiny eps Adam would turn the noise around that 0 into a full step either way.
It also lets a wrongly scaled gradient show in the weights, which a tiny eps would hide. A bias starts at 0 and moves by up to lr a
step; where two steps cancel, what is left says nothing of the steps, so weights all smaller than lr are measured against lr.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite import launch, models, optim
from megalite.config import Config
from megalite.models.layers import Batch

TOLERANCE = 1e-5
STEPS = 3
RATE = 1e-2  # the learning rate


@dataclass
class Step:
    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def config_of(
    *, family: str = "gpt", style: str = "gpt2", tied: bool = True, layers: int = 3, dp: int = 1, pp: int = 1, tp: int = 1, **train: object
) -> Config:
    """A model small enough for a second, odd enough to find mistakes: widths and vocabulary that no degree divides well."""
    llama = {"positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 4, "mlp": 50}
    return Config.model_validate(
        {
            "model": {
                "family": family, "layers": layers, "width": 48, "heads": 8 if style == "llama" else 4, "vocab": 67, "sequence": 16,
                "tied": tied, "init_std": 0.1, **(llama if style == "llama" else {"activation": "gelu"} if family == "bert" else {}),
            },
            "mesh": {"dp": dp, "pp": pp, "tp": tp},
            "train": {"steps": 100, "global_batch": 16, "micro_batch": 2, "precision": "fp32", "clip": 0.5, **train},
            "optimizer": {"lr": RATE, "warmup": 2, "weight_decay": 0.1, "eps": 1e-3},
        }
    )  # fmt: skip


def batch_of(config: Config, step: int) -> Batch:
    """The global batch of one step: the same on every mesh."""
    model, size = config.model, config.train.global_batch
    draw = torch.Generator().manual_seed(1000 + step)
    assert model.vocab is not None
    ids = torch.randint(0, model.vocab, (size, model.sequence), generator=draw)
    labels = torch.randint(0, model.vocab, ids.shape, generator=draw)
    if model.family == "gpt":
        return {"ids": ids, "labels": labels}
    hidden = torch.rand(ids.shape, generator=draw) > 0.2 + 0.2 * torch.rand((size, 1), generator=draw)  # uneven over the samples
    lengths = torch.randint(model.sequence // 2, model.sequence + 1, (size,), generator=draw)
    return {
        "ids": ids,
        "labels": labels.masked_fill(hidden, -100),
        "segments": (torch.arange(model.sequence) > 7).long().expand(size, -1).contiguous(),
        "length": lengths,
        "next_sentence": torch.randint(0, 2, (size,), generator=draw),
    }


def reference(config: Config, *, steps: int = STEPS) -> list[Step]:
    """One process, plain model, plain AdamW, the whole global batch at once."""
    whole = models.build(config.model, seed=config.run.seed)
    named = dict(whole.named_parameters())
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": settings.weight_decay * optim.decays(name, tuple(p.shape))} for name, p in named.items()],
        betas=settings.betas,
        eps=settings.eps,
    )
    history = []
    for step in range(steps):
        batch = batch_of(config, step)
        targets = batch["labels"] != -100
        batch["weights"] = targets / targets.sum()
        batch["pair_weights"] = torch.full((config.train.global_batch,), 1 / config.train.global_batch)
        loss = whole(batch).sum()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(whole.parameters(), config.train.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, settings, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        history.append(Step(loss.item(), norm, gradients, {name: p.detach().clone() for name, p in named.items()}))
    return history


def on_mesh(config: Config, *, zero: dict | int = 0, steps: int = STEPS) -> list[Step]:
    """The same steps on forked ranks; `zero` is a stage or a whole DeepSpeed document."""
    document = {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}} if isinstance(zero, int) else zero
    mesh = config.mesh
    world = (mesh.dp or 1) * mesh.pp * mesh.tp
    ranks = launch.run_ranks(world, functools.partial(_work, config=config, document=document, steps=steps), warm=("megalite.engine",))
    return assemble(ranks, steps=steps)


def assemble(ranks: list, *, steps: int) -> list[Step]:
    """What every rank answered in `_work`, put together: whole gradients and weights of every step."""
    history = []
    for step in range(steps):
        losses = {rank[step][0] for rank in ranks}
        norms = {rank[step][1] for rank in ranks}
        assert len(losses) == len(norms) == 1, f"ranks disagree: losses {losses}, norms {norms}"
        gradients, weights = (put_together([rank[step][kind] for rank in ranks]) for kind in (2, 3))
        history.append(Step(losses.pop(), norms.pop(), gradients, weights))
    return history


def put_together(owned: list[list[tuple]]) -> dict[str, Tensor]:
    """Whole tensors from the (cut, start, flat) of every rank. Copies (tp, ZeRO 0, both ends of a tie) must be equal bit for bit."""
    whole: dict[str, Tensor] = {}
    for cut, start, flat in (piece for pieces in owned for piece in pieces):
        full = whole.setdefault(cut.name, torch.full(cut.shape, float("nan")))
        for block in cut.rectangles(start, start + flat.numel()):
            place = full[tuple(slice(o, o + n) for o, n in zip(block.offsets, block.sizes, strict=True))]
            values = flat[block.start - start : block.stop - start].view(block.sizes)
            known = ~place.isnan()
            assert torch.equal(place[known], values[known]), f"copies of {cut.name} differ"
            place.copy_(values)
    return whole


def start_engine(config: Config, document: dict, device: str = "cpu"):
    from megalite.engine import Engine
    from megalite.mesh import Mesh

    mesh = Mesh.start(dp=config.mesh.dp or 1, pp=config.mesh.pp, tp=config.mesh.tp, device=torch.device(device))
    return Engine(config, mesh, document=document)


def masters(engine) -> list[tuple]:
    return [(piece.cut, piece.start, piece.master.clone()) for piece in engine.zero.pieces()]


def _work(rank: int, *, config: Config, document: dict, steps: int, device: str = "cpu") -> list:
    engine = start_engine(config, document, device)
    seen: list = []
    engine.zero.before_update = lambda pieces: seen.append([(p.cut, p.start, p.gradient.clone()) for p in pieces])
    history = []
    for step in range(steps):
        mine = microbatches(batch_of(config, step), config, engine.mesh.dp, engine.mesh.dp_rank)
        report = engine.step(step, mine)
        history.append((report.loss, report.grad_norm, seen.pop(), masters(engine)))
    return history


def microbatches(batch: Batch, config: Config, dp: int, dp_rank: int) -> list[Batch]:
    """This rank's microbatches of a global batch, as the loader deals them."""
    share, size = config.train.global_batch // dp, config.train.micro_batch
    return [
        {name: value[dp_rank * share + first : dp_rank * share + first + size] for name, value in batch.items()}
        for first in range(0, share, size)
    ]


def difference(ours: Tensor, theirs: Tensor, *, least: float = 1e-30) -> float:
    """max |a - b| / max |b|, or / `least` where all of b is smaller than that."""
    assert ours.shape == theirs.shape and not ours.isnan().any(), "a part of the tensor is owned by no rank"
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)).item()


def assert_same(ours: list[Step], theirs: list[Step], *, tied: dict[str, str], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs) >= 3
    for number, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(mine.loss - plain.loss) <= tolerance * abs(plain.loss), f"step {number}: loss {mine.loss} is not {plain.loss}"
        assert abs(mine.grad_norm - plain.grad_norm) <= tolerance * plain.grad_norm, (
            f"step {number}: norm {mine.grad_norm} is not {plain.grad_norm}"
        )
        for what in ("gradients", "weights"):
            a, b = getattr(mine, what), getattr(plain, what)
            assert a.keys() - tied.keys() == b.keys() - tied.keys(), f"step {number}: {what} of other parameters"
            least = RATE if what == "weights" else 1e-30
            worst = max((difference(a[name], b[tied.get(name, name)], least=least), name) for name in a)
            assert worst[0] <= tolerance, f"step {number}: {what} of {worst[1]} differ by {worst[0]:.2e}"
