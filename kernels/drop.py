"""The Triton kernels of dropout.py: a row's stream is drawn in registers, four features from every 64 bits; and what attention draws from.

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


@triton.jit(do_not_specialize=["site"])
def draw(SAMPLES, HEADS, OUT, heads, length, site, COLUMNS: tl.constexpr):
    """OUT (2, b, h, length), of the rows and of the keys: COLUMNS places of one head of one sample."""
    pair = tl.program_id(0).to(tl.int64)
    key = tl.load(SAMPLES + pair // heads).to(tl.uint64, bitcast=True)
    head = tl.load(HEADS + pair % heads).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    stream = ((head << 32) + place).to(tl.uint64) * GOLDEN
    which = site.to(tl.int64)
    rows = mix(mix(key + which.to(tl.uint64)) + stream)
    keys = mix(mix(key + (-1 - which).to(tl.uint64)) + stream)
    out, there = OUT + pair * length + place, place < length
    tl.store(out, rows.to(tl.int32), mask=there)
    tl.store(out + tl.num_programs(0).to(tl.int64) * length, keys.to(tl.int32), mask=there)


def run_draw(samples: Tensor, heads: Tensor, length: int, site: int) -> Tensor:
    """(2, b, h, length) int32."""
    b, h = len(samples), len(heads)
    out = torch.empty((2, b, h, length), dtype=torch.int32, device=samples.device)
    if out.numel():
        with torch.cuda.device_of(samples):
            grid = (b * h, triton.cdiv(length, COLUMNS))
            draw[grid](samples.contiguous(), heads.contiguous(), out, h, length, site, COLUMNS=COLUMNS, num_warps=WARPS)
    return out


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
