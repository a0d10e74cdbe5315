"""`python -m megalite_kernels.bench [--output FILE.json]`: our kernels beside every peer PyTorch has, on the GPU at hand, as one table.

Peers: SDPA by cuDNN, flash and efficient, compiled FlexAttention, and torch's varlen_attn for packed documents. Same process, in turn,
random normal inputs, medians, 16k tokens. TFLOP/s count what is seen, a backward pass 2.5 forward passes. P is the best peer. Dropout
multiplies nothing: its table is in GB/s, of what has to pass through memory once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attention, why_not_triton
from .clock import measure
from .cross_entropy import linear_cross_entropy
from .dropout import dropout
from .spans import packed_spans

TOKENS = 16384
HEADS = {64: 32, 128: 16}
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


@dataclass(frozen=True)
class Row:
    """One line: seconds of each way, what it computes, and where it counts, the bytes it needs beside inputs and gradients."""

    what: str
    work: float  # FLOPs, or of dropout bytes
    seconds: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)

    def rates(self) -> dict[str, float]:
        """In units a second."""
        return {name: self.work / seconds for name, seconds in self.seconds.items()}

    def ratio(self) -> float | None:
        """Our speed over P, the best peer's."""
        peers = [seconds for name, seconds in self.seconds.items() if not name.startswith("ours")]
        return min(peers) / self.seconds["ours"] if peers and "ours" in self.seconds else None


def dense(width: int, length: int, *, causal: bool, device: torch.device, backward: bool, deterministic: bool = False) -> Row:
    """b sequences of one length, TOKENS tokens together."""
    b, h = max(1, TOKENS // length), HEADS[width]
    q, k, v = (torch.randn(b, length, h, width, device=device, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3))
    pairs = length * (length + 1) // 2 if causal else length * length
    ways: dict[str, Callable[[], Tensor]] = {"ours": lambda: attention(q, k, v, causal=causal, deterministic=deterministic)}  # type: ignore[dict-item, return-value]
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        ways[name.removesuffix("_ATTENTION").lower()] = _sdpa(name, q, k, v, causal=causal)
    if not deterministic:
        ways["flex"] = _flex(q, k, v, (lambda b, h, i, j: i >= j) if causal else None)
    what = f"{'backward' if backward else 'forward'} {width} {'causal' if causal else 'dense'} {length}{' deterministic' * deterministic}"
    flops = 4.0 * b * h * width * pairs * (2.5 if backward else 1)
    with _determinism(deterministic):
        return Row(what, flops, measure(_passes(ways, (q, k, v)) if backward else ways, device=device, required=("ours",)))


def packed(width: int, tokens: int, *, device: torch.device) -> Row:
    """Documents of random length, 2k on average, in one row of tokens; forward and backward, building the mask included."""
    h = HEADS[width]
    lengths = torch.exp(7.3 + 0.8 * torch.randn(tokens // 512)).long().clamp(16)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    ends = torch.cat([ends[ends < tokens], torch.tensor([tokens])]).to(device=device, dtype=torch.int32)
    longest, sizes = int(ends.diff().max()), ends.diff().double()
    q, k, v = (torch.randn(tokens, h, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def ours() -> Tensor:
        return attention(q, k, v, spans=packed_spans(ends, tokens=tokens, causal=True))  # type: ignore[return-value]

    def varlen() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))  # type: ignore[return-value]

    number = torch.repeat_interleave(torch.arange(len(ends) - 1, device=device), ends.diff().long())
    flex = _flex(q[None], k[None], v[None], lambda b, h, i, j: (number[i] == number[j]) & (i >= j), rebuild=True)
    ways = {"ours": ours, "varlen": varlen, "flex": lambda: flex()[0]}
    flops = 4.0 * h * width * float((sizes * (sizes + 1) / 2).sum()) * 3.5
    return Row(
        f"packed {width} {tokens} fwd+bwd", flops, measure(_passes(ways, (q, k, v), forward=True), device=device, required=("ours",))
    )


def loss(tokens: int, vocabulary: int, width: int, *, device: torch.device) -> Row:
    """Linear map and cross-entropy, forward and backward: in pieces, in eager PyTorch, and compiled. FLOPs are those of three products."""
    x, weight = (torch.randn(n, width, device=device, dtype=torch.bfloat16) / width**0.5 for n in (tokens, vocabulary))
    inputs = tuple(t.requires_grad_() for t in (x, weight))
    labels = torch.randint(0, vocabulary, (tokens,), device=device)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels)

    made = {"ours": lambda: linear_cross_entropy(x, weight, labels, pieces=32).mean(), "eager": plain, "compiled": torch.compile(plain)}
    ways = {name: partial(_differentiate, way, inputs) for name, way in made.items()}
    memory = {name: _needed(way, device) - x.nbytes - weight.nbytes for name, way in ways.items()} if device.type == "cuda" else {}
    seconds = measure(ways, device=device, required=("ours",))
    return Row(f"cross-entropy {vocabulary} words, {tokens} tokens, width {width} fwd+bwd", 6.0 * x.numel() * vocabulary, seconds, memory)


def dropped(width: int, *, device: torch.device) -> Row:
    """Dropout and the sum behind it, forward and backward: ours, its PyTorch form, that compiled, and torch's own with other numbers.
    A forward pass reads two tensors and writes one, a backward pass reads one and writes one.
    """
    x, residual = (torch.randn(8, TOKENS // 8, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    samples, places = (torch.arange(n, device=device) for n in x.shape[:2])
    given = torch.randn_like(x)

    def plain() -> Tensor:
        return dropout(x, samples, places, site=7, rate=0.1, residual=residual, impl="reference")

    made: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: dropout(x, samples, places, site=7, rate=0.1, residual=residual),
        "eager": plain,
        "compiled": torch.compile(plain),
        "torch": lambda: residual + F.dropout(x, 0.1),
    }
    ways = {name: partial(_give_back, way, (x, residual), given) for name, way in made.items()}
    memory = {name: _needed(way, device) - 3 * x.nbytes for name, way in ways.items()} if device.type == "cuda" else {}
    return Row(f"dropout, width {width}, fwd+bwd", 5.0 * x.nbytes, measure(ways, device=device, required=("ours",)), memory)


def _give_back(way: Callable[[], Tensor], inputs: tuple[Tensor, ...], given: Tensor) -> object:
    return torch.autograd.grad(way(), inputs, given)


def _differentiate(way: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> object:
    return torch.autograd.grad(way(), inputs)


def _needed(way: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at a time, after a call that compiles."""
    way()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way()
    return torch.cuda.max_memory_allocated(device) - before


def _determinism(on: bool) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def switched() -> Any:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(on, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    return switched()


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal).transpose(1, 2)

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, seen: Callable[..., Any] | None, *, rebuild: bool = False) -> Callable[[], Tensor]:
    """rebuild: the block mask is made anew in every call, as a new batch needs it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, build = torch.compile(flex_attention), torch.compile(create_block_mask)
    kept: dict[str, Any] = {}

    def run() -> Tensor:
        if seen is not None and (rebuild or "mask" not in kept):
            kept["mask"] = build(seen, None, None, q.shape[1], k.shape[1], device=str(q.device))
        out = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=kept.get("mask"))
        return out.transpose(1, 2)

    return run


def _passes(ways: dict[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...], *, forward: bool = False) -> dict[str, Callable[[], object]]:
    """Backward passes alone, on a graph that is kept; or forward and backward."""
    dout = torch.randn_like(inputs[0])

    def passing(way: Callable[[], Tensor]) -> Callable[[], object]:
        kept: list[Tensor] = []

        def run() -> object:
            if forward:
                return torch.autograd.grad(way(), inputs, dout)
            if not kept:
                kept.append(way())
            return torch.autograd.grad(kept[0], inputs, dout, retain_graph=True)

        return run

    return {name: passing(way) for name, way in ways.items()}


def table(rows: list[Row], *, unit: str = "TFLOP/s") -> str:
    """Markdown: the rate of every way, and ours over the best peer."""
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    lines = [f"| {unit} | " + " | ".join(names) + " | ours / P |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        rates, ratio = row.rates(), row.ratio()
        cells = [f"{rates[name] / UNITS[unit]:.0f}{_gigabytes(row, name)}" if name in rates else "-" for name in names]
        lines.append(f"| {row.what} | " + " | ".join(cells) + f" | {'-' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines)


def _gigabytes(row: Row, name: str) -> str:
    return f" ({row.memory[name] / 1e9:.2f} GB)" if name in row.memory else ""


def why_nothing() -> str | None:
    """Why there is nothing to measure here, and where there would be; None where there is."""
    there = torch.cuda.is_available()
    reason = why_not_triton(torch.empty(0, device="cuda", dtype=torch.bfloat16)) if there else "there is no GPU"
    return reason and f"nothing is measured: {reason}; run this where there is an NVIDIA GPU of sm80 or newer, or a gfx942"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megalite_kernels.bench", description=__doc__)
    parser.add_argument("--output", type=Path, help="also write every time as JSON")
    chosen = parser.parse_args(arguments)
    say = lambda text: sys.stdout.write(text + "\n")  # noqa: E731
    if reason := why_nothing():
        say(reason)
        return 2
    device = torch.device("cuda")
    torch.manual_seed(0)
    rows: list[Row] = []
    for backward, width, causal, length in itertools.product((False, True), (128, 64), (True, False), (2048, 8192, 16384)):
        rows.append(dense(width, length, causal=causal, device=device, backward=backward))
        say(table(rows[-1:]).splitlines()[-1])
    rows.append(dense(128, 8192, causal=True, device=device, backward=True, deterministic=True))
    rows += [packed(128, tokens, device=device) for tokens in (16384, 65536)]
    rows += [loss(8192, 131072, width, device=device) for width in (2048, 4096)]
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    rest = [dropped(width, device=device) for width in (1024, 4096)]
    say(f"{where}\n\n{table(rows)}\n\n{table(rest, unit='GB/s')}")
    rows += rest
    if chosen.output:
        chosen.output.write_text(json.dumps({"where": where, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
