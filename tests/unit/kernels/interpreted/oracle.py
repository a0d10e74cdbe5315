"""What attention should be, said without the code under test: a boolean mask from its definition, and plain PyTorch in any precision.

`judge` holds kernels to the rule of the house: the error against fp64 is at most twice that of plain PyTorch in the same precision.
Errors are 2-norms over a tensor, relative to its own; the largest single error is a lottery.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv", "dsink")


def grid(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(keys)[None, :]


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in the precision of q, by softmax over scores with the sink as one more column. keep: 0 or 1 / (1 - p) for dropout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing[..., 0], float("-inf"))
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    weights = weights[..., : k.shape[2]]
    if keep is not None:
        weights = weights * keep.to(weights.dtype)
    return (weights @ v).transpose(1, 2), lse


def gradients(run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], dout: Tensor, dlse: Tensor | None) -> list[Tensor]:
    """out, lse and every gradient, in fp64, for inputs cast by the caller."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, lse = run(*inputs)
    outputs, given = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, given = [out, lse], [*given, dlse.to(lse.dtype)]
    return [t.detach().double() for t in (out, *torch.autograd.grad(outputs, inputs, given))], lse.detach().double()  # type: ignore[return-value]


def error(found: Tensor, right: Tensor) -> float:
    assert found.isfinite().all(), "not finite"
    return float((found - right).norm() / right.norm().clamp(min=1e-30))


def _cancellation(sink: Tensor, lse: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None) -> float:
    """How much larger the terms of a sink's gradient are than their sum."""
    lost = (out * dout).sum(-1).transpose(1, 2) - (0.0 if dlse is None else dlse)
    terms = torch.exp(sink[:, None] - lse) * lost  # (b, h, s)
    return float(terms.abs().sum((0, 2)).norm() / terms.sum((0, 2)).norm())


def judge(
    kernel: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], mask: Tensor, *, dlse: bool = False, options: dict[str, Any]
) -> None:
    """kernel(q, k, v[, sink]) -> out, lse against `plain` in fp64, beside `plain` in the precision of the inputs."""
    q, rest = inputs[0], inputs[3:]

    def reference(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return plain(q, k, v, mask, sink=rest[0] if rest else None, **options)

    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    seen = mask.any(-1)[:, None].expand(q.shape[0], q.shape[2], -1)
    given = torch.where(seen, torch.randn(seen.shape, generator=torch.Generator().manual_seed(6)), 0.0) if dlse else None
    right, right_lse = gradients(reference, [t.double() for t in inputs], dout, given)
    beside, _ = gradients(reference, inputs, dout, given)
    found, lse = gradients(kernel, inputs, dout, given)
    floor = 1e-7 if q.dtype == torch.float32 else 1e-4
    for name, ours, theirs, exact in zip(NAMES, found, beside, right, strict=False):
        assert ours.shape == exact.shape
        # a sink's gradient is a sum over all rows that nearly cancels: its terms, not the sum, are what is rounded
        factor = _cancellation(rest[0].double(), right_lse, right[0], dout, given) if name == "dsink" else 1.0
        off, allowed = error(ours, exact), 2 * error(theirs, exact) + floor * factor
        assert off <= allowed, f"{name} is off by {off:.2e}, twice plain PyTorch in {q.dtype} is {allowed:.2e}"
    blind = right_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    torch.testing.assert_close(
        lse.masked_fill(blind, 0), right_lse.masked_fill(blind, 0), rtol=1e-5, atol=2e-6 if q.dtype == torch.float32 else 2e-3
    )
    assert not found[0][~seen.transpose(1, 2)].any(), "a row that sees nothing gives 0"
