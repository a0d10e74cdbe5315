"""`attend`: the one door to attention. Queries, keys and values in, mixed values out.

On a GPU that the kernels of `megalite_kernels` know, they do the work; elsewhere PyTorch's SDPA does. Before a kernel is trusted it is held
to plain PyTorch once a process, on this GPU, in this precision and head width. The kernels' mask, spans, is the same for all layers:
`with_spans` puts it into a batch once. On Hopper, where nothing is masked but the future, cuDNN does the work through PyTorch: it is faster
there (docs/benchmarks).

Shapes: b batch, s sequence, h query heads, g key-value heads, k head width.
"""

from __future__ import annotations

from functools import cache

import torch
from megalite_kernels import Spans, attention  # pyright: ignore[reportMissingImports] # the folder kernels/ under another name
from megalite_kernels.randomness import Draws, kept  # pyright: ignore[reportMissingImports]
from megalite_kernels.selftest import why_not  # pyright: ignore[reportMissingImports]
from megalite_kernels.spans import document_spans, padding_spans  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.config import Model
from megalite.models.batch import Batch


def is_fused(q: Tensor, *, dropout: bool = False) -> bool:
    """Whether the kernels do the work for queries like q (..., k): its device, precision and head width count, and whether they drop."""
    return q.is_cuda and why_not(q, dropout=dropout) is None


def with_spans(batch: Batch, *, model: Model, dtype: torch.dtype) -> Batch:
    """The batch, and in it the mask of its documents or padding as the kernels want it, "spans" (4, b, s), where the kernels are in use.

    For a batch whose sequences are not cut yet: attention sees whole ones. `dtype` is that of queries, keys and values.
    """
    masked = batch.get("length" if model.family == "bert" else "documents")
    if masked is None or not is_fused(torch.empty(0, model.head_width, dtype=dtype, device=masked.device)):
        return batch
    causal = model.family == "gpt"
    spans = _spans(causal=causal, lengths=batch.get("length"), documents=batch.get("documents"), rows=batch["ids"].shape[1])
    assert spans is not None
    return {**batch, "spans": torch.stack(spans)}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    lengths: Tensor | None = None,
    documents: Tensor | None = None,
    spans: Tensor | None = None,
    dropout: tuple[float, Draws] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(k)) v with q (b, s, h, k), k and v (b, s, g, k), g dividing h; returns (b, s, h, k).

    causal: row i sees keys 0..i. lengths (b,): keys from lengths[b] on are padding that no row sees; lengths are at least 1.
    documents (b, s): the number of each token's document, never decreasing; a row sees only its own. spans (4, b, s): lengths or
    documents as the kernels want them, from `with_spans`; built here where missing. dropout: the share of the probabilities that is zeroed,
    and the numbers of every row (b, h, s) and key (b, h, s) that say which. Without the kernels all of them are kept in memory for it.
    """
    assert lengths is None or (documents is None and not causal), "padding is masked for bidirectional attention only"
    dense = lengths is None and documents is None and dropout is None
    if dense and q.is_cuda and _has_cudnn(str(q.device), q.dtype, q.shape[2], q.shape[3], k.shape[2]):
        return _attend_by_cudnn(q, k, v, causal=causal)
    if is_fused(q, dropout=dropout is not None):
        bounds = _spans(causal=causal, lengths=lengths, documents=documents, rows=q.shape[1]) if spans is None else Spans(*spans)
        rate, draws = dropout or (0.0, None)
        mixed = attention(q, k, v, causal=causal and bounds is None, spans=bounds, dropout_p=rate, draws=draws)
        assert isinstance(mixed, Tensor)
        return mixed
    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None, :]  # (b, 1, 1, s)
    if documents is not None:
        mask = (documents[:, :, None] == documents[:, None, :])[:, None]  # (b, 1, s, s)
        mask = mask.tril() if causal else mask
    if dropout is not None:
        return _attend_with_dropout(q, k, v, *dropout, mask=mask, causal=causal)
    return _attend_by_sdpa(q, k, v, mask=mask, causal=causal)


@torch.compiler.assume_constant_result
def _has_cudnn(device: str, dtype: torch.dtype, heads: int, width: int, keys: int) -> bool:
    """Whether to leave attention of so many heads of a width to cuDNN: it has no deterministic backward pass here."""
    return not torch.are_deterministic_algorithms_enabled() and _try_cudnn(device, dtype, heads, width, keys)


@cache
def _try_cudnn(device: str, dtype: torch.dtype, heads: int, width: int, keys: int) -> bool:
    """Hopper, and right there: it is held to PyTorch's own arithmetic, forward and back."""
    if torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0) or dtype not in (torch.bfloat16, torch.float16):
        return False
    with torch.random.fork_rng(devices=[device]), torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.randn(1, 128, h, width, device=device, dtype=dtype) for h in (heads, keys, keys)]
        exact, ours = ([t.to(precision).requires_grad_() for t in inputs] for precision in (torch.float32, dtype))
        try:
            found = _attend_by_cudnn(*ours, causal=True)
            found = [found, *torch.autograd.grad(found.float().square().sum(), ours)]
        except RuntimeError:  # this cuDNN, or this PyTorch, has nothing for such heads
            return False
        with sdpa_kernel(SDPBackend.MATH):
            right = _attend_by_sdpa(*exact, causal=True, mask=None)
        right = [right, *torch.autograd.grad(right.square().sum(), exact)]
        return all(float((a.detach().float() - b.detach()).norm() / b.detach().norm()) < 2e-2 for a, b in zip(found, right, strict=True))


def _attend_by_cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    turned = ((t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*turned, None, needs_gradient, 0.0, causal, False)[0].transpose(1, 2)


def _attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return mixed.transpose(1, 2)


def _attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, rate: float, draws: Draws, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Step by step, for SDPA draws from a generator of its own, which no other layout can repeat."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k).float() * q.shape[-1] ** -0.5
    if causal and mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.where(kept(draws, dropout_p=rate), scores.softmax(dim=-1) / (1 - rate), 0)
    return torch.einsum("bhij,bjhk->bihk", weights.to(v.dtype), v)


def _spans(*, causal: bool, lengths: Tensor | None, documents: Tensor | None, rows: int) -> Spans | None:
    """The mask of a batch; None where every sequence has the same."""
    if lengths is None and documents is None:
        return None
    if documents is not None:
        return document_spans(documents, causal=causal)
    assert lengths is not None
    return padding_spans(lengths, rows=rows, keys=rows)


def positions_in(documents: Tensor) -> Tensor:
    """Where each token stands in its own document: (b, s) numbers of documents -> (b, s)."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - (places * begins).cummax(dim=1).values


def rotate(x: Tensor, base: float, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x (b, s, h, k), halves rotated as in Llama; fp32 inside.

    positions (b, s) where tokens do not stand at 0, 1, 2, ... of one document.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    places = torch.arange(x.shape[1], device=x.device) if positions is None else positions
    angles = places.float()[..., None] * frequencies  # (s, k / 2) or (b, s, k / 2)
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)  # one for all heads
    first, second = x.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
