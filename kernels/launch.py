"""From tensors to launches: strides, descriptors, grids and the tile configuration of the GPU at hand. The only door to the kernels.

In: tensors (b, s, h, k) with the head width innermost, checked by attention.py. Out: contiguous results.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from . import backward, forward
from .randomness import Draws, limit_of
from .spans import Spans
from .tables import Tile, arch_of, block_of, choose, kind_of

LOG2E = 1.4426950408889634
STATS = 128  # what is kept for rows and keys is padded to whole tiles; no table has larger ones
Tiles = dict[str, Tile]


@dataclass(frozen=True)
class Call:
    """One attention: everything but the tensors. low and high are the band where there are no spans."""

    low: int
    high: int
    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def numbers(self) -> tuple[float, float]:
        """inner and factor: scores in base 2 are factor * f(inner * q k), f the identity or tanh."""
        if self.softcap:
            return self.scale / self.softcap, self.softcap * LOG2E
        return 1.0, self.scale * LOG2E


class Operands(NamedTuple):
    """q (b, s, h, k), k and v (b, n, g, k); spans, or the band of the call; sink (h,); draws where there is dropout."""

    q: Tensor
    k: Tensor
    v: Tensor
    spans: Spans | None = None
    sink: Tensor | None = None
    draws: Draws | None = None


def run_forward(x: Operands, call: Call, *, chosen: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """out (b, s, h, k) and lse (b, h, s) fp32 in base 2. `chosen` overrides the table, for the sweep."""
    (b, s, h, _), n = x.q.shape, x.k.shape[1]
    out = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=x.q.device)
    if not out.numel():
        return out, lse.fill_(float("-inf"))
    tile = _tile("forward", x, call, chosen)
    inner, factor = call.numbers
    with torch.cuda.device_of(x.q):
        drawn = _line_up(x.draws)
        forward.attend[(triton.cdiv(s, tile.rows), h, b)](
            *_operands(tile, (x.q, tile.rows), (x.k, tile.keys), (x.v, tile.keys)), out, lse, *_bounds(x)[:2], x.sink, drawn,
            inner, factor, 1.0 - call.dropout_p,
            call.low, call.high, s, n, _stride(x.spans, s), limit_of(call.dropout_p), _padded(s), _padded(n),
            *_strides(tile, x.q, x.k, x.v), *out.stride()[:3], SINKS=x.sink is not None, **_constants(tile, x, call), **_options(tile, x.q),
        )  # fmt: skip
    return out, lse


def run_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, x: Operands, call: Call, *, chosen: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous. dlse is the gradient of lse, where it has one."""
    (b, s, h, _), (n, g) = x.q.shape, x.k.shape[1:3]
    empty = lambda t, dtype: torch.empty(t.shape, dtype=dtype, device=t.device)  # noqa: E731
    dk, dv = empty(x.k, x.k.dtype), empty(x.v, x.v.dtype)
    if not x.q.numel() or not x.k.numel():
        return empty(x.q, x.q.dtype).zero_(), dk.zero_(), dv.zero_()
    fused_tile = _find("by_keys_fused", x, call, chosen)  # at width 256 no tile of the fused form fits the registers
    fused = fused_tile is not None and not call.deterministic
    dq = empty(x.q, torch.float32).zero_() if fused else empty(x.q, x.q.dtype)
    stats = torch.empty((b * h, 2, _padded(s)), dtype=torch.float32, device=x.q.device)
    inner, factor = call.numbers
    numbers = (inner, factor, call.scale, 1.0 - call.dropout_p, call.low, call.high, s, n)
    limits = (limit_of(call.dropout_p), _padded(s), _padded(n), _padded(s))
    with torch.cuda.device_of(x.q):
        drawn = _line_up(x.draws)
        tile = _tile("prepare", x, call, chosen)
        backward.prepare[(_padded(s) // tile.rows, h, b)](
            out, dout, lse, dlse, stats, s, _padded(s), *out.stride()[:3], *dout.stride()[:3],
            HEADS=h, WIDTH=x.q.shape[3], BLOCK=block_of(x.q.shape[3]), ROWS=tile.rows, DLSES=dlse is not None, **_options(tile, x.q),
        )  # fmt: skip
        tile = fused_tile if fused_tile and fused else _tile("by_keys", x, call, chosen)
        loaded = ((x.q, tile.rows), (x.k, tile.keys), (x.v, tile.keys), (dout, tile.rows))
        backward.by_keys[(triton.cdiv(n, tile.keys), g, b)](
            *_operands(tile, *loaded), *(_operands(tile, (dq, tile.rows)) if fused else (None,)), dk, dv, stats, *_bounds(x)[2:], drawn,
            *numbers, _stride(x.spans, n), *limits, *_strides(tile, x.q, x.k, x.v, dout),
            FUSED=fused, **_constants(tile, x, call), **_options(tile, x.q),
        )  # fmt: skip
        if fused:
            return dq.mul_(call.scale).to(x.q.dtype), dk, dv
        tile = _tile("by_rows", x, call, chosen)
        loaded = ((x.q, tile.rows), (x.k, tile.keys), (x.v, tile.keys), (dout, tile.rows))
        backward.by_rows[(triton.cdiv(s, tile.rows), h, b)](
            *_operands(tile, *loaded), dq, stats, *_bounds(x)[:2], drawn,
            *numbers, _stride(x.spans, s), *limits, *_strides(tile, x.q, x.k, x.v, dout),
            **_constants(tile, x, call), **_options(tile, x.q),
        )  # fmt: skip
    return dq, dk, dv


def _padded(length: int) -> int:
    return (length + STATS - 1) // STATS * STATS


def _line_up(draws: Draws | None) -> Tensor | None:
    """The numbers of dropout as the kernels read them, without a mask: (b, h, rows + keys), each padded to a whole tile."""
    if draws is None:
        return None
    return torch.cat([F.pad(side, (0, _padded(side.shape[-1]) - side.shape[-1])) for side in draws], dim=-1)


def _tile(kernel: str, x: Operands, call: Call, chosen: Tiles | None) -> Tile:
    tile = _find(kernel, x, call, chosen)
    assert tile is not None, f"the table has no {kernel}"
    return tile


def _find(kernel: str, x: Operands, call: Call, chosen: Tiles | None) -> Tile | None:
    if chosen and kernel in chosen:
        return chosen[kernel]
    kind = kind_of(x.q.shape[-1], spans=x.spans is not None, features=call.softcap > 0 or call.dropout_p > 0)
    return choose(arch_of(x.q.device), kernel, width=x.q.shape[-1], kind=kind, dtype=x.q.dtype)


def _bounds(x: Operands) -> tuple[Tensor | None, ...]:
    return x.spans or (None,) * 4


def _stride(spans: Spans | None, length: int) -> int:
    """From one sequence's bounds to the next."""
    return 0 if spans is None or len(spans.lo) == 1 else length


def _constants(tile: Tile, x: Operands, call: Call) -> dict[str, Any]:
    (heads, width), groups = x.q.shape[2:], x.k.shape[2]
    return {
        "HEADS": heads, "GROUP": heads // groups, "WIDTH": width, "BLOCK": block_of(width), "ROWS": tile.rows, "KEYS": tile.keys,
        "SPANS": x.spans is not None, "SOFTCAP": call.softcap > 0, "DROPOUT": call.dropout_p > 0, "DESCRIPTOR": tile.descriptor,
    }  # fmt: skip


def _options(tile: Tile, q: Tensor) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if q.is_cuda and not torch.version.hip:
        options["enable_fp_fusion"] = True  # scores * factor - top is one instruction; Triton's default changes with 3.10
    return options


def _described(x: Tensor) -> bool:
    """Whether the hardware's tile loads (TMA) can read x as rows (b s) of (h k) columns."""
    s, h, width = x.shape[1:]
    row = x.stride(1)
    whole = (x.stride(3) == 1) and (h == 1 or x.stride(2) == width) and (x.shape[0] == 1 or x.stride(0) == s * row)
    return whole and row >= h * width and x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0


def _operands(tile: Tile, *tensors: tuple[Tensor, int]) -> list[Any]:
    """Pointers, or descriptors of blocks of so many rows; what no descriptor can read is copied."""
    if not tile.descriptor:
        return [x for x, _ in tensors]
    found = []
    for x, rows in tensors:
        b, s, h, width = x.shape
        if not _described(x):
            x = x.contiguous()
        found.append(TensorDescriptor(x, shape=[b * s, h * width], strides=[x.stride(1), 1], block_shape=[rows, width]))
    return found


def _strides(tile: Tile, *tensors: Tensor) -> list[int]:
    """Batch, row and head strides; a descriptor carries its own."""
    return [stride for x in tensors for stride in ((0, 0, 0) if tile.descriptor else x.stride()[:3])]
