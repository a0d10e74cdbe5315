"""From what ZeRO reduced to an update the whole mesh agrees on: sums that ZeRO knows nothing of, the norm, clipping, fp16's loss scale.

In: the pieces of this rank between reduction and optimizer.  Out: their gradients, complete and clipped, in place, and
the norm of the whole mesh. Every decision, to clip and to skip, is taken from that one number, so all ranks take the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.parallel.pieces import Piece


@dataclass
class LossScale:
    """fp16's factor on the loss, so that small gradients do not vanish: halved when one overflows, doubled after `patience` good steps.

    Micikevicius et al. 2017, arXiv:1710.03740, section 3.2; the numbers are those of torch.amp.GradScaler. Scaled once, where the loss
    is; the factor travels back through the stages with the gradients.
    """

    value: float = 2.0**16
    good_steps: int = 0
    skipped: int = 0
    patience: int = 2000

    def update(self, *, overflow: bool) -> None:
        """After every step. Raises UserError where even a scale of 1 overflows."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        self.skipped += overflow
        if overflow:
            self.value /= 2
            if self.value < 1:
                raise UserError("gradients overflow in fp16 even without a loss scale; use train.precision = bf16, or lower optimizer.lr")
        elif self.good_steps == self.patience:
            self.value, self.good_steps = self.value * 2, 0


def complete(pieces: list[Piece], mesh: Mesh, *, partial: bool, uneven: bool) -> None:
    """Add up what several ranks have parts of and ZeRO does not reduce, in place.

    Tied weights: over both ends of the pipeline. partial (sequence parallelism): what tensor-parallel ranks hold as copies. uneven:
    shards differ in size, so copies must be kept equal.
    """
    tied = [_gradient(piece) for piece in pieces if piece.tied]
    if tied and mesh.pp > 1:
        flat = torch.cat(tied).to(mesh.device)  # offloaded ones come from the host
        dist.all_reduce(flat, group=mesh.group("ends"))
        _put(flat, tied)
    whole = [_gradient(piece) for piece in pieces if piece.cut.dim is None]
    if (partial or uneven) and whole:
        flat = torch.cat(whole).to(mesh.device)
        _sum_or_align(flat, mesh.group("tp"), partial=partial)
        _put(flat, whole)


def norm(pieces: list[Piece], mesh: Mesh, *, beside: Tensor) -> tuple[float, list[float]]:
    """Of the gradients of the whole mesh, every logical element once; not finite where one of them is not. And the sum of every rank's
    `beside` (n,), so that in a step the host waits for the device once, with the update still to come.
    """
    total = torch.zeros((), dtype=torch.float64 if mesh.device.type == "cpu" else torch.float32, device=mesh.device)
    if found := [_gradient(piece) for piece in pieces if piece.first]:
        norms = torch._foreach_norm(found, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        total += torch.stack(norms).to(total.device, total.dtype).square().sum()
    both = torch.cat([total.view(1), beside.to(total.dtype)])
    dist.all_reduce(both)
    squares, *rest = both.tolist()
    return math.sqrt(squares), rest


def multiply(pieces: list[Piece], factor: float) -> None:
    if pieces:
        torch._foreach_mul_([_gradient(piece) for piece in pieces], factor)  # pyright: ignore[reportPrivateImportUsage]


def _gradient(piece: Piece) -> Tensor:
    assert piece.gradient is not None, f"no gradient of {piece.cut.name}"
    return piece.gradient


def _sum_or_align(flat: Tensor, group: dist.ProcessGroup, *, partial: bool) -> None:
    """Give every tensor-parallel rank the same gradients of what they hold as copies: the sum of their parts, or the first one's.

    Without parts they are equal already but for their last bits, where shards differ in size: a copy lies at another place of the
    reduction's buffer on every rank then, a ring adds up its dp terms in another order there, and copies would drift apart.
    """
    if partial:
        dist.all_reduce(flat, group=group)
    else:
        dist.broadcast(flat, src=dist.get_global_rank(group, 0), group=group)


def _put(flat: Tensor, gradients: list[Tensor]) -> None:
    for gradient, value in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(value)
