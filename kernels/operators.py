"""The kernels as PyTorch operators, `megalite::attention_forward` and `megalite::attention_backward`: what torch.compile, checkpointing,
FakeTensor, the FLOP counter and autograd see. A selective checkpoint saves torch.ops.megalite.attention_forward.default.

Shapes as in attention.py; b = 1 for packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .randomness import Draws
from .spans import Spans

LOG2E = 1.4426950408889634


def attend(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans | None, *, low: int, high: int, scale: float, softcap: float, sink: Tensor | None,
    dropout_p: float, draws: Draws | None, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (b, s, h, k) and lse (b, h, s) in base 2, both with gradients; spans, or the band low, high.

    Base 2 is what the kernels use, and every change of base would round.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    bounds, sides = spans or (None,) * 4, draws or (None,) * 2
    return torch.ops.megalite.attention_forward(q, k, v, *bounds, sink, *sides, low, high, scale, softcap, dropout_p, deterministic)


def _spans(*bounds: Tensor | None) -> Spans | None:
    lo, hi, first, last = bounds
    if lo is None or hi is None or first is None or last is None:
        return None
    return Spans(lo, hi, first, last)


def _draws(rows: Tensor | None, keys: Tensor | None) -> Draws | None:
    return None if rows is None or keys is None else Draws(rows, keys)


@torch.library.custom_op("megalite::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, first: Tensor | None, last: Tensor | None,
    sink: Tensor | None, row_draws: Tensor | None, key_draws: Tensor | None,
    low: int, high: int, scale: float, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import launch

    call = launch.Call(low, high, scale, softcap, dropout_p, deterministic)
    return launch.run_forward(launch.Operands(q, k, v, _spans(lo, hi, first, last), sink, _draws(row_draws, key_draws)), call)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, s, h, _width = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((b, h, s), dtype=torch.float32)


@torch.library.custom_op("megalite::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lo: Tensor | None, hi: Tensor | None, first: Tensor | None, last: Tensor | None,
    row_draws: Tensor | None, key_draws: Tensor | None,
    low: int, high: int, scale: float, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import launch

    call = launch.Call(low, high, scale, softcap, dropout_p, deterministic)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.float().contiguous()
    x = launch.Operands(q, k, v, _spans(lo, hi, first, last), None, _draws(row_draws, key_draws))
    return launch.run_backward(dout, dlse, out, lse, x, call)


@attention_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *others = inputs
    ctx.save_for_backward(q, k, v, *output, *others[:7])
    ctx.numbers = others[7:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lo, hi, first, last, sink, *draws = ctx.saved_tensors
    nothing = (None,) * 13
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = torch.ops.megalite.attention_backward(dout, dlse, q, k, v, out, lse, lo, hi, first, last, *draws, *ctx.numbers)
    dsink = None
    if sink is not None and ctx.needs_input_grad[7]:
        # the sink's weight gives no value: d loss / d sink = weight * (dlse - sum(out * dout)), summed over the rows
        lost = (out.float() * dout.float()).sum(-1).transpose(1, 2)  # (b, h, s)
        lost = lost if dlse is None else lost - dlse * LOG2E
        dsink = -(torch.exp2(sink.float()[:, None] * LOG2E - lse) * lost).sum((0, 2)).to(sink.dtype)
    return (*gradients, *nothing[:4], dsink, *nothing[5:])


attention_forward.register_autograd(_differentiate, setup_context=_remember)


def _pairs(rows: int, keys: int, low: int, high: int) -> int:
    """Rows and keys that see each other under a band."""
    row = torch.arange(rows)
    return int(((row + high).clamp(0, keys) - (row + low).clamp(0, keys)).clamp(min=0).sum())


def _count(q: Any, k: Any, lo: Any, hi: Any, low: int, high: int) -> int:
    """Of one product over everything that is seen; spans whose numbers are not there (FakeTensor) count as if all were."""
    b, s, h, width = q.shape
    if lo is None:
        pairs = b * _pairs(s, k.shape[1], low, high)
    elif isinstance(lo, torch._subclasses.FakeTensor) or lo.is_meta:
        pairs = b * s * k.shape[1]
    else:
        pairs = int((hi - lo).sum()) * (b // len(lo))
    return 2 * h * width * pairs


@register_flop_formula(torch.ops.megalite.attention_forward, get_raw=True)
def _forward_flops(q, k, v, lo, hi, first, last, sink, row_draws, key_draws, low, high, *_, **__) -> int:
    return 2 * _count(q, k, lo, hi, low, high)


@register_flop_formula(torch.ops.megalite.attention_backward, get_raw=True)
def _backward_flops(dout, dlse, q, k, v, out, lse, lo, hi, first, last, row_draws, key_draws, low, high, *_, **__) -> int:
    return 5 * _count(q, k, lo, hi, low, high)
