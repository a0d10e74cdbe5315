"""Dropout and the sum behind it in one: residual + dropout(x), by a mask that is a function of (sample, place, site, feature) and is kept
nowhere. The backward pass is the same kernel over the gradient, so nothing of x's size waits for it.

In: x (b, s, d), the key of every sample (b,) and the place of every row in its sample (s,) or (b, s), int64.  Out: the same on every mesh,
in every recomputation and after every resume. The bits are those of splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195):
a row of features is a stream of its own, seeded by a mix of everything but the feature; each 64-bit output serves four features with 16
bits each. In Triton (drop.py) they never leave the registers; in PyTorch they are a dozen tensors of two bytes an element of x.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .attention import why_not_triton
from .randomness import GOLDEN, Draws, mix, sides, streams

SHARES = 65536  # rates are multiples of 1 / SHARES


def dropout(
    x: Tensor,
    samples: Tensor,
    places: Tensor,
    *,
    site: int,
    rate: float,
    residual: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor:
    """x (b, s, d) with a share `rate` of it zeroed and the rest scaled by its inverse, plus residual (b, s, d) where there is one.

    samples (b,), places (s,) or (b, s); site tells the dropouts of a model apart. The rate is rounded to a multiple of 2^-16. ValueError
    for input that cannot be computed. impl: auto is Triton where it runs and PyTorch elsewhere.
    """
    dropped = round(rate * SHARES)
    if not 0 <= dropped < SHARES:
        raise ValueError(f"rate = {rate}; give a share from 0 to below {1 - 0.5 / SHARES}")
    if x.ndim != 3 or samples.shape != x.shape[:1] or places.shape not in (x.shape[:2], x.shape[1:2]):
        shapes = f"x {tuple(x.shape)}, samples {tuple(samples.shape)}, places {tuple(places.shape)}"
        raise ValueError(f"{shapes}: give (b, s, d), (b,) and (b, s) or (s,)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} is added to x {tuple(x.shape)}; give it the same shape")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl = {impl!r} is unknown; choose auto, triton or reference")
    reason = _why_not(x, x.dtype) if impl == "auto" else why_not_triton(x) if impl == "triton" else "reference"
    if impl == "triton" and reason:
        raise ValueError(f"impl = triton, but {reason}; use impl = auto or reference")
    if reason:
        left = drop(x, streams(samples[:, None], places, site=site), dropped)
        return left if residual is None else residual + left
    if residual is not None:
        both = torch.promote_types(x.dtype, residual.dtype)  # autocast leaves them in two
        x, residual = x.to(both), residual.to(both)
    return torch.ops.megalite.dropout(x, samples, places.expand(x.shape[:2]), residual, site, dropped)


def _why_not(x: Tensor, dtype: torch.dtype) -> str | None:
    from .selftest import why_not_dropout

    return why_not_dropout(x, dtype) if x.is_cuda else "no GPU"


def draws(samples: Tensor, heads: Tensor, length: int, *, site: int, impl: Literal["auto", "triton", "reference"] = "auto") -> Draws:
    """What attention's dropout draws from: a 32-bit number for every row and every key of the heads, which stand at 0 .. length - 1.

    samples (b,) are the samples' keys, heads (h,) numbers in the whole model, int64. impl as for `dropout`.
    """
    if impl == "reference" or (impl == "auto" and _why_not(samples, torch.float32)):
        return sides(samples, heads, length, site=site)
    return Draws(*torch.ops.megalite.draws(samples, heads, length, site))


def drop(x: Tensor, seeds: Tensor, dropped: int) -> Tensor:
    """The PyTorch form: zero a share dropped / 65536 of x (..., d) and scale the rest by its inverse; seeds (...)."""
    counters = torch.arange(1, (x.shape[-1] + 3) // 4 + 1, device=x.device) * GOLDEN
    bits = mix(seeds.unsqueeze(-1) + counters).view(torch.int16)[..., : x.shape[-1]]
    return torch.where(bits >= dropped - SHARES // 2, x * (SHARES / (SHARES - dropped)), 0)


@torch.library.custom_op("megalite::dropout", mutates_args=())
def _dropout(x: Tensor, samples: Tensor, places: Tensor, residual: Tensor | None, site: int, dropped: int) -> Tensor:
    from . import drop as kernels

    return kernels.run(x, samples, places, residual, site=site, dropped=dropped, scale=SHARES / (SHARES - dropped))


@_dropout.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("megalite::draws", mutates_args=())
def _draws(samples: Tensor, heads: Tensor, length: int, site: int) -> Tensor:
    from . import drop as kernels

    return kernels.run_draw(samples, heads, length, site)


@_draws.register_fake
def _(samples: Tensor, heads: Tensor, length: int, site: int) -> Tensor:
    return torch.empty((2, len(samples), len(heads), length), dtype=torch.int32, device=samples.device)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is saved, as autograd understands it: a checkpoint that computes a layer again ends where what was saved is there, and need
    neither drop again nor multiply for it. What is at hand instead are whole numbers of the batch, that nobody changes.
    """
    _, *ctx.where, residual, site, dropped = inputs
    ctx.added, ctx.numbers = residual is not None, (site, dropped)


def _go_back(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.megalite.dropout(given, *ctx.where, None, *ctx.numbers)
    return dx, None, None, given if ctx.added else None, None, None


_dropout.register_autograd(_go_back, setup_context=_remember)
