"""The Triton kernel of dropout.py: a row's stream is drawn in registers, four features from every 64 bits.

In: x and the residual (b, s, d) in any strides.  Out: contiguous (b, s, d). Memory sees each operand once.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_0, MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
COLUMNS, WARPS = 1024, 4  # a program's; held to no spills by tests/unit/kernels/test_compiled.py


@triton.jit
def mix(x):
    """The finalizer of splitmix64, of uint64."""
    x = (x ^ (x >> 30)) * MIX_0
    x = (x ^ (x >> 27)) * MIX_1
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["site", "dropped"])
def drop(
    X, SAMPLES, PLACES, RESIDUAL, OUT, length, width, x_batch, x_row, x_column, residual_batch, residual_row, residual_column,
    places_batch, places_row, site, dropped, scale, ADD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one row of a sample, COLUMNS features. ADD: RESIDUAL is added."""
    sample, row = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    key = tl.load(SAMPLES + sample).to(tl.uint64, bitcast=True)
    place = tl.load(PLACES + sample * places_batch + row * places_row).to(tl.uint64, bitcast=True)
    seed = mix(mix(key + site.to(tl.uint64)) + place * GOLDEN)
    group = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    bits = mix(seed + (group + 1).to(tl.uint64) * GOLDEN)
    lane = tl.arange(0, 4)
    share = (bits[:, None] >> (16 * lane[None, :]).to(tl.uint64)) & 0xFFFF
    kept = (share.to(tl.int32) ^ 0x8000) >= dropped  # as signed numbers, from the smallest one on
    column = 4 * group[:, None] + lane[None, :]
    there = column < width
    x = tl.load(X + sample * x_batch + row * x_row + column * x_column, mask=there, other=0.0).to(tl.float32)
    found = tl.where(kept, x * scale, 0.0)
    if ADD:
        rest = tl.load(RESIDUAL + sample * residual_batch + row * residual_row + column * residual_column, mask=there, other=0.0)
        found += rest.to(tl.float32)
    place_out = OUT + (sample * length + row) * width + column
    tl.store(place_out, found.to(OUT.dtype.element_ty), mask=there)


def run(x: Tensor, samples: Tensor, places: Tensor, residual: Tensor | None, *, site: int, dropped: int, scale: float) -> Tensor:
    """`scale` is what the features that are left are multiplied by."""
    (b, s, d), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        beside = x if residual is None else residual
        with torch.cuda.device_of(x):
            drop[(b * s, triton.cdiv(d, COLUMNS))](
                x, samples.contiguous(), places, beside, out, s, d, *x.stride(), *beside.stride(), *places.stride(), site, dropped, scale,
                ADD=residual is not None, COLUMNS=COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return out
