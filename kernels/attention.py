"""`attention`: softmax(q k^T) v with one idea of a mask, in Triton where it runs and in plain PyTorch elsewhere.

FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608) over spans: see
spans.py for the mask, forward.py and backward.py for the kernels, reference.py for the same in plain PyTorch.

Shapes: b batch, s query rows, n keys, h query heads, g key-value heads (dividing h), k head width, t packed tokens.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from . import operators
from .randomness import Draws, draw
from .reference import attend_exactly
from .spans import FAR, Spans, band, bounded_spans, packed_spans, padding_spans

WIDEST = 256
MOST = 65535  # a grid's second and third dimension
LN2 = 0.6931471805599453
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    spans: Spans | None = None,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    draws: Draws | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v: q (b, s, h, k), k and v (b, n, g, k), or packed (t, h, k) and (t, g, k); returns q's shape and dtype.

    Slices of a fused projection are read in place: any strides with the head width innermost.

    causal: row i sees keys up to its own place, the last row standing at the last key. window: at most that many keys back, itself
    included, and as many ahead where not causal. key_lengths (b,): later keys are padding. cu_seqlens (d + 1,): document d is the
    tokens [cu_seqlens[d], cu_seqlens[d + 1]), for packed input. spans: the mask itself, built once a batch (spans.py), instead of
    those four. A row that sees nothing gives 0.

    scale: 1 / sqrt(k) unless given. softcap c > 0: scores become c tanh(score / c) (Gemma 2, arXiv:2408.00118). sink (h,): a score per head
    that takes weight and gives no value (Xiao et al. 2023, arXiv:2309.17453). dropout_p: weights are dropped with this probability;
    draws say which (randomness.py), by default drawn from torch's generator. deterministic: bitwise the same gradients on every run; None
    follows torch.use_deterministic_algorithms.
    return_lse: also the log of the softmax's denominator, (b, h, s) or (h, t), fp32, -inf where a row sees nothing; it has a gradient.
    impl: auto is Triton on a GPU of sm80 or newer or a gfx942, and PyTorch elsewhere, with one warning that says why.

    Under autocast, q, k and v are cast to its dtype. ValueError for input that cannot be computed.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    _check_tensors(q, k, v)
    _check_options(q, scale=scale, softcap=softcap, sink=sink, dropout_p=dropout_p, window=window)
    _check_mask(q, k, causal=causal, window=window, spans=spans, cu_seqlens=cu_seqlens, key_lengths=key_lengths)
    packed = q.ndim == 3
    if packed:
        q, k, v = (t[None] for t in (q, k, v))
    rows, keys = q.shape[1], k.shape[1]
    low, high = -FAR, FAR
    if cu_seqlens is not None:
        spans = packed_spans(cu_seqlens, tokens=rows, causal=causal, window=window)
    elif key_lengths is not None:
        spans = padding_spans(key_lengths, rows=rows, keys=keys, causal=causal, window=window)
    elif spans is None:
        low, high = band(rows, keys, causal=causal, window=window)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if dropout_p:
        draws = draw(q.shape[0], q.shape[2], rows, keys, device=q.device) if draws is None else draws
        _check_draws(draws, q, keys)
    else:
        draws = None
    if _chosen(impl, q) == "triton":
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        out, lse = operators.attend(
            q, k, v, spans, low=low, high=high, scale=scale, softcap=float(softcap), sink=sink, dropout_p=dropout_p, draws=draws,
            deterministic=deterministic,
        )  # fmt: skip
        lse = lse * LN2 if return_lse else lse
    else:
        mask = (spans or _of_band(q, keys, low, high)).mask()
        dropout = None if draws is None else (dropout_p, draws)
        out, lse = attend_exactly(q, k, v, mask, scale=scale, softcap=softcap, sink=sink, dropout=dropout)
        lse = lse.float()
    if packed:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _of_band(q: Tensor, keys: int, low: int, high: int) -> Spans:
    row = torch.arange(q.shape[1], device=q.device)[None]
    return bounded_spans(row + low, row + high, keys=keys)


def _chosen(impl: str, q: Tensor) -> str:
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl = {impl!r} is unknown; choose auto, triton or reference")
    reason = why_not_triton(q) if impl != "reference" else None
    if impl == "triton" and reason:
        raise ValueError(f"impl = triton, but {reason}; use impl = auto or reference")
    if impl == "auto" and reason:
        _say(reason)
    return "reference" if impl == "reference" or reason else "triton"


def why_not_triton(q: Tensor) -> str | None:
    """Why the kernels cannot run on this tensor; None where they can."""
    if q.dtype == torch.float64:
        return "q is float64, and the kernels compute in fp32"
    return _ask(str(q.device))


@torch.compiler.assume_constant_result  # what is true while a compiler traces is true when the graph runs
def _ask(device: str) -> str | None:
    return _why_not_on(device)


@cache
def _why_not_on(device: str) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if not device.startswith("cuda"):
        return f"Triton's kernels need a GPU, and q is on {device}"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if name == "gfx942" else f"{name} is not a GPU the kernels were made for (gfx942)"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU is sm{major}{minor}, and the kernels need the tensor cores of sm80 or newer"


@torch.compiler.assume_constant_result
def _say(reason: str) -> None:
    _say_once(reason)


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"attention runs in plain PyTorch, slower and with more memory: {reason}", stacklevel=5)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim not in (3, 4) or k.ndim != q.ndim or k.shape != v.shape:
        raise ValueError(f"{shapes}: give (b, s, h, k) with k and v (b, n, g, k), or packed (t, h, k) with k and v (t, g, k)")
    if q.shape[-1] != k.shape[-1] or (q.ndim == 4 and q.shape[0] != k.shape[0]) or (q.ndim == 3 and q.shape[0] != k.shape[0]):
        raise ValueError(f"{shapes}: q, k and v differ in batch, tokens or head width; make them the same")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{q.shape[-2]} query heads are no multiple of {k.shape[-2]} key-value heads; change either")
    if not 1 <= q.shape[-1] <= WIDEST:
        raise ValueError(f"head width {q.shape[-1]} is not within 1 to {WIDEST}; use more heads")
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; give one dtype and device")
    if q.shape[0] > MOST and q.ndim == 4:
        raise ValueError(f"{q.shape[0]} sequences are more than a launch can number, {MOST}; pack them or split the batch")
    if q.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"q is {q.dtype}; use bfloat16, float16 or float32")


def _check_draws(draws: Draws, q: Tensor, keys: int) -> None:
    b, s, h, _ = q.shape
    for name, side, length in (("rows", draws.rows, s), ("keys", draws.keys, keys)):
        if side.shape != (b, h, length) or side.dtype != torch.int32:
            found = f"{tuple(side.shape)} {side.dtype}"
            raise ValueError(f"draws.{name} is {found}; for these tensors it must be {(b, h, length)} torch.int32")


def _check_options(q: Tensor, *, scale: float | None, softcap: float, sink: Tensor | None, dropout_p: float, window: int | None) -> None:
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale = {scale} is no number above 0; change the sign of q instead")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap = {softcap} is no number from 0 (none) on; choose one such as 50.0")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p = {dropout_p} is not within [0, 1); choose a share such as 0.1")
    if window is not None and window < 1:
        raise ValueError(f"window = {window} keys; use at least 1, which is the row's own, or None for all")
    if sink is not None and (sink.shape != (q.shape[-2],) or sink.device != q.device):
        raise ValueError(f"sink {tuple(sink.shape)} on {sink.device}, but q has {q.shape[-2]} heads on {q.device}; give one score a head")


def _check_mask(
    q: Tensor, k: Tensor, *, causal: bool, window: int | None, spans: Spans | None, cu_seqlens: Tensor | None, key_lengths: Tensor | None
) -> None:
    if spans is not None:
        if causal or window is not None or cu_seqlens is not None or key_lengths is not None:
            raise ValueError("spans are the whole mask; leave out causal, window, cu_seqlens and key_lengths, or build them into the spans")
        batch, rows, keys = (1, q.shape[0], k.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[1], k.shape[1])
        for name, bound, length in zip(Spans._fields, spans, (rows, rows, keys, keys), strict=True):
            if bound.shape not in ((batch, length), (1, length)) or bound.dtype != torch.int32 or not bound.is_contiguous():
                raise ValueError(
                    f"spans.{name} is {bound.dtype} {tuple(bound.shape)}, but must be contiguous int32 ({batch} or 1, {length}); "
                    "build it with megalite_kernels.spans for this length"
                )
    if cu_seqlens is not None and (q.ndim != 3 or key_lengths is not None):
        raise ValueError(f"cu_seqlens is for packed q (t, h, k) without key_lengths, but q is {tuple(q.shape)}; pack it or use key_lengths")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point()):
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}: give the d + 1 ends of d documents as integers")
    if key_lengths is not None and (q.ndim != 4 or key_lengths.shape != (q.shape[0],) or key_lengths.is_floating_point()):
        raise ValueError(
            f"key_lengths {tuple(key_lengths.shape)} {key_lengths.dtype}: give one integer for each sequence of q {tuple(q.shape)}"
        )
