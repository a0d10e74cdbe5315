"""Tensor parallelism, applied to a plain layer from outside: column, row, heads, vocabulary embedding, vocabulary-parallel loss.

In: a layer on the meta device, a plan of names -> cuts, the tensor-parallel axis.  Out: the same layer with its modules
swapped for the ones here and with a `Cut` on every parameter, shapes local to this rank. Shoeybi et al. 2019, arXiv:1909.08053:

    column   y_i = x A_i        A cut along its output; x is copied, its gradient summed
    row      y = sum_i x_i A_i  A cut along its input; the partial sums are reduced, then the bias is added once

With sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) what lies between a row and the next column is cut along the sequence:
a column gathers its input, a row and the embedding scatter their sums, and what is held whole there, norms and biases, gets its
gradient in parts, which `zero.py` sums.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from megalite_kernels import linear_statistics  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.layout import Cut, split
from megalite.mesh import Mesh
from megalite.parallel import collectives
from megalite.parallel.context import Ulysses
from megalite.parallel.later import gradients, linear


class ColumnLinear(nn.Module):
    """x (b, s, d) -> this rank's columns (b, s, f / tp); with `sequence_parallel` x is this rank's part (b, s / tp, d)."""

    def __init__(self, plain: nn.Linear, group: dist.ProcessGroup, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.group, self.sequence_parallel = plain.weight, plain.bias, group, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gathered_linear(x, self.weight, self.bias, self.group.group_name)
        return linear(collectives.copy(x, self.group), self.weight, self.bias)


@torch.library.custom_op("megalite::gathered_linear", mutates_args=())
def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: str) -> Tensor:
    """linear(gather(x)) that keeps x and not the gathered x, which the backward pass gathers again; one operation for recomputation."""
    return F.linear(collectives.all_gather(x, collectives.named(group)), weight, bias)


@gathered_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * collectives.named(group).size(), weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, group = inputs
    ctx.save_for_backward(x)
    ctx.weight, ctx.bias, ctx.group = weight, bias, collectives.named(group)


def _go_back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    x, weight, bias, group = ctx.saved_tensors[0].detach(), ctx.weight, ctx.bias, ctx.group
    later = getattr(weight, "later", None)
    if later is not None and later.put_off(lambda: later.make(weight, bias, collectives.all_gather(x, group), grad)):
        return collectives.reduce_scatter(grad @ weight, group), None, None, None
    whole = collectives.all_gather(x, group)
    return collectives.reduce_scatter(grad @ weight, group), *gradients(whole, grad, biased=bias is not None), None


gathered_linear.register_autograd(_go_back, setup_context=_keep)


class RowLinear(nn.Module):
    """This rank's share of the input (b, s, f / tp) -> the whole output (b, s, d), the same on every rank, or its part (b, s / tp, d)."""

    def __init__(self, plain: nn.Linear, group: dist.ProcessGroup, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.group = plain.weight, plain.bias, group
        self.combine = collectives.scatter if sequence_parallel else collectives.reduce

    def forward(self, x: Tensor) -> Tensor:
        y = self.combine(linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(nn.Module):
    """ids (b, s) -> (b, s, d), or this rank's part of it; each rank looks up the ids it holds, the sum over the ranks is the embedding."""

    def __init__(self, plain: nn.Embedding, group: dist.ProcessGroup, rows: range, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight, self.group, self.rows = plain.weight, group, rows
        self.combine = collectives.scatter if sequence_parallel else collectives.reduce

    def forward(self, ids: Tensor) -> Tensor:
        here = (ids >= self.rows.start) & (ids < self.rows.stop)
        found = F.embedding((ids - self.rows.start).where(here, 0), self.weight)
        return self.combine(found * here.unsqueeze(-1), self.group)


class VocabularyProjection(ColumnLinear):
    """A column that makes logits (b, s, v / tp) of this rank's `rows` of the vocabulary; given labels (b, s), their statistics (3, b s)."""

    def __init__(self, plain: nn.Linear, group: dist.ProcessGroup, rows: range, *, sequence_parallel: bool) -> None:
        super().__init__(plain, group, sequence_parallel=sequence_parallel)
        self.rows, self.pieces = rows, 1

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(x)
        x = (collectives.gather if self.sequence_parallel else collectives.copy)(x, self.group).flatten(0, 1)
        return linear_statistics(x, self.weight, self.bias, labels.flatten(), first=self.rows.start, pieces=self.pieces)


class VocabularyLoss(nn.Module):
    """Weighted cross-entropy over a vocabulary that lies on several ranks: no rank ever holds all logits of a token.

    logits (b, s, v / tp), labels (b, s), weights (b, s) -> the sum, shape (), the same on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, rows: range) -> None:
        super().__init__()
        self.group, self.rows = group, rows

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = _CrossEntropy.apply(logits.flatten(0, 1), labels.clamp(min=0).flatten(), self.rows, self.group)
        return torch.dot(losses, weights.flatten().float())  # type: ignore[arg-type]

    def of_statistics(self, statistics: Tensor, weights: Tensor) -> Tensor:
        """The same from the statistics (3, b s) of this rank's part of the logits."""
        lse, own, _ = _Statistics.apply(statistics, self.group).unbind()  # type: ignore[union-attr]
        return torch.dot(lse - own, weights.flatten().float())


class _Statistics(torch.autograd.Function):
    """Log-sum-exp, the label's logit and the sum of logits, (3, n), of every rank's part of the vocabulary -> those of all of it.

    Two all-reduces, of n and of 3 n numbers.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest = mine[0].clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        joined = torch.cat([(mine[:1] - largest).exp(), mine[1:]])
        dist.all_reduce(joined, group=group)
        joined[0] = joined[0].log() + largest
        ctx.save_for_backward((mine[0] - joined[0]).exp())  # the share of this rank's words in the softmax
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return torch.cat([grads[0][:1] * share, grads[0][1:]]), None


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] with logits (n, v / tp); three all-reduces of n numbers, fp32 inside."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rows: range, group: dist.ProcessGroup) -> Tensor:
        logits32 = logits.float()
        largest = logits32.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits32 - largest.unsqueeze(-1)
        here = (labels >= rows.start) & (labels < rows.stop)
        local = (labels - rows.start).where(here, 0)
        own = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1) * here
        exp = shifted.exp_()
        total = exp.sum(dim=-1)
        dist.all_reduce(own, group=group)
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), local, here)
        ctx.dtype = logits.dtype
        return total.log() - own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, local, here = ctx.saved_tensors  # the probabilities, changed in place: the largest tensor of the step, used once
        grad.scatter_add_(-1, local.unsqueeze(-1), -here.unsqueeze(-1).to(grad.dtype))
        return grad.mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def cut(layer: nn.Module, name: str, *, plan: dict[str, str], mesh: Mesh, sequence_parallel: bool = False) -> None:
    """Cut `layer` (on the meta device, called `name` in the model) by the plan, in place; every parameter gets its `.cut`.

    With tp = cp = 1 only the `.cut`s are written: the model stays plain.
    """
    for path, module in list(layer.named_modules(prefix=name)):
        how = _rule(plan, path)
        if how is None:
            for leaf, parameter in module.named_parameters(recurse=False):
                _mark(parameter, Cut(f"{path}.{leaf}", tuple(parameter.shape)))
            continue
        swapped = _cut_module(module, path, how=how, mesh=mesh, sequence_parallel=sequence_parallel)
        if swapped is not module:
            parent, _, leaf = path[len(name) + 1 :].rpartition(".")
            setattr(layer.get_submodule(parent), leaf, swapped)


def _rule(plan: dict[str, str], path: str) -> str | None:
    return plan.get(re.sub(r"\.\d+\.", ".*.", path))


def _mark(parameter: nn.Parameter, cut: Cut) -> None:
    parameter.cut = cut  # type: ignore[attr-defined]


def _cut_module(module: nn.Module, path: str, *, how: str, mesh: Mesh, sequence_parallel: bool) -> nn.Module:
    if how == "heads":
        module.part = mesh.tp_rank * mesh.cp + mesh.cp_rank  # type: ignore[assignment]
        return Ulysses(module, mesh.group("cp")) if mesh.cp > 1 else module
    dims = {
        "column": {"weight": 0, "bias": 0},
        "row": {"weight": 1, "bias": None},
        "vocabulary": {"weight": 0},
        "projection": {"weight": 0, "bias": 0},
        "vocabulary_loss": {},
    }[how]
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        sections = getattr(module, "sections", ()) if dims[leaf] == 0 else ()
        found = Cut(f"{path}.{leaf}", tuple(parameter.shape), dims[leaf], tuple(sections), index=mesh.tp_rank, num=mesh.tp)
        local = nn.Parameter(torch.empty(found.local_shape, dtype=parameter.dtype, device="meta"))
        _mark(local, found)
        setattr(module, leaf, local)
    if mesh.tp == 1:
        return module
    group = mesh.group("tp")
    if how == "column":
        assert isinstance(module, nn.Linear)
        return ColumnLinear(module, group, sequence_parallel=sequence_parallel)
    if how == "projection":
        assert isinstance(module, nn.Linear)
        return VocabularyProjection(module, group, _rows(module.out_features, mesh), sequence_parallel=sequence_parallel)
    if how == "row":
        assert isinstance(module, nn.Linear)
        return RowLinear(module, group, sequence_parallel=sequence_parallel)
    if how == "vocabulary":
        assert isinstance(module, nn.Embedding)
        return VocabularyEmbedding(module, group, _rows(module.num_embeddings, mesh), sequence_parallel=sequence_parallel)
    return VocabularyLoss(group, _rows(int(module.vocab), mesh))  # type: ignore[arg-type]


def _rows(size: int, mesh: Mesh) -> range:
    sizes = split(size, mesh.tp)
    start = sum(sizes[: mesh.tp_rank])
    return range(start, start + sizes[mesh.tp_rank])
