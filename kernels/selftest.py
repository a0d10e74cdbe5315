"""A kernel is trusted on a GPU after it agreed there with plain PyTorch, in this precision and at this head width, once a process.

What the interpreter and the compiler cannot see (asynchronous copies, descriptors, a new driver) would otherwise go into the weights. The
shape is small and ragged; both forms of the backward pass and both kinds of mask are run. A kernel that is off, or fails, is not used, and
one warning says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from .attention import attention, why_not_triton
from .cross_entropy import linear_statistics
from .dropout import draws, dropout
from .randomness import draw
from .spans import packed_spans

ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}  # of the 2-norm; a wrong tile is off by a tenth and more
ROWS = 333


def why_not(q: Tensor, *, dropout: bool = False) -> str | None:
    """Why the kernels are not to be used for tensors like q; None where they are. With dropout they are others, and tested too."""
    return why_not_triton(q) or _ask(str(q.device), q.dtype, q.shape[-1], dropout)


@torch.compiler.assume_constant_result
def _ask(device: str, dtype: torch.dtype, width: int, dropout: bool) -> str | None:
    return _disagreement(device, dtype, width, dropout)


def why_not_rows(x: Tensor) -> str | None:
    """Why the kernels over rows of logits are not to be used for tensors like x; None where they are."""
    return why_not_triton(x) or _ask_without_width("cross-entropy", str(x.device), x.dtype)


def why_not_dropout(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels of dropout are not to be used where x is, in that precision; None where they are."""
    return why_not_triton(x) or _ask_without_width("dropout", str(x.device), dtype)


@torch.compiler.assume_constant_result
def _ask_without_width(which: str, device: str, dtype: torch.dtype) -> str | None:
    return _disagreement_without_width(which, device, dtype)


@cache
def _disagreement_without_width(which: str, device: str, dtype: torch.dtype) -> str | None:
    test = {"cross-entropy": disagreement_of_rows, "dropout": disagreement_of_dropout}[which]
    return _trusted(lambda: test(torch.device(device), dtype), device, f"fused {which} is not used on {device} in {dtype}")


@cache
def _disagreement(device: str, dtype: torch.dtype, width: int, dropout: bool) -> str | None:
    what = f"fused attention{' with dropout' if dropout else ''} is not used on {device} in {dtype} at head width {width}"
    return _trusted(lambda: disagreement(torch.device(device), dtype, width, dropout=dropout), device, what)


def _trusted(test: Callable[[], str | None], device: str, what: str) -> str | None:
    """What the test found, said once in a warning; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []), torch.inference_mode(False), torch.enable_grad():
        try:
            found = test()
        except Exception as error:  # a compiler or driver that fails has no class of its own, and must not end a training run
            found = f"it failed: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    if found:
        warnings.warn(f"{what}: {found}", stacklevel=4)
    return found


def disagreement(device: torch.device, dtype: torch.dtype, width: int, *, dropout: bool = False) -> str | None:
    """The first case in which a kernel is further from fp32 PyTorch than its precision allows; None if there is none."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, ROWS, heads, width, device=device).to(dtype) for heads in (4, 2, 2)]
    dout = torch.randn(1, ROWS, 4, width, device=device).to(dtype)
    documents = packed_spans(torch.tensor([0, 70, 71, 300, ROWS], device=device), tokens=ROWS, causal=True)
    dropped = {"dropout_p": 0.2, "draws": draw(1, 4, ROWS, ROWS, device=device)} if dropout else {}
    for masked, deterministic in product((False, True), (False, True)):
        mask = {"spans": documents} if masked else {"causal": True}
        answers = []
        for impl, precision in (("triton", dtype), ("reference", torch.float32)):
            tensors = [t.detach().to(precision).requires_grad_() for t in inputs]
            with torch.autocast(device.type, enabled=False):
                out = attention(*tensors, **mask, **dropped, deterministic=deterministic, impl=impl)  # pyright: ignore[reportArgumentType]
            assert isinstance(out, Tensor)
            answers.append([out, *torch.autograd.grad(out, tensors, dout.to(precision))])
        for name, ours, exact in zip(("out", "dq", "dk", "dv"), *answers, strict=True):
            off = float((ours.detach().float() - exact.detach()).norm() / exact.detach().norm())
            if not off <= ALLOWED[dtype]:
                form = f"{'documents' if masked else 'causal'}, {'deterministic' if deterministic else 'fast'}"
                return f"{name} is off by {off:.1e} of its norm, {ALLOWED[dtype]:.0e} is allowed ({form})"
    return None


def disagreement_of_rows(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of the statistics of logits and their gradients, in one piece and in two uneven ones of a vocabulary that fills no block."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 32, device=device).to(dtype) for n in (ROWS, 9001))
    bias, labels = torch.randn(9001, device=device).to(dtype), torch.randint(-100, 9101, (ROWS,), device=device)
    given = torch.randn(3, ROWS, device=device)
    for pieces in (1, 2):
        answers = []
        for impl, precision in (("triton", dtype), ("reference", torch.float32)):
            tensors = [t.detach().to(precision).requires_grad_() for t in (x, weight, bias)]
            with torch.autocast(device.type, enabled=False):
                found = linear_statistics(*tensors, labels, pieces=pieces, impl=impl)  # pyright: ignore[reportArgumentType, reportCallIssue]
            answers.append([*found.unbind(), *torch.autograd.grad(found, tensors, given)])
        for name, ours, exact in zip(("lse", "own", "total", "dx", "dweight", "dbias"), *answers, strict=True):
            off = float((ours.detach().float() - exact.detach()).norm() / exact.detach().norm())
            if not off <= ALLOWED[dtype]:
                return f"{name} is off by {off:.1e} of its norm, {ALLOWED[dtype]:.0e} is allowed ({pieces} pieces)"
    return None


def disagreement_of_dropout(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of dropout with its sum, and its gradient, of rows that fill no block and places that are far apart; and of what attention
    draws from, to the bit.
    """
    torch.manual_seed(0)
    x, residual, given = (torch.randn(2, ROWS, 1037, device=device).to(dtype) for _ in range(3))
    samples, places = torch.randint(-(2**62), 2**62, (2,), device=device), torch.arange(ROWS, device=device) * 7919
    ways = (draws(samples, places[3:9], ROWS, site=-(2**62) - 1, impl=impl) for impl in ("triton", "reference"))
    if not all(map(torch.equal, *ways)):
        return "numbers that attention draws from are others"
    answers = []
    for impl, precision in (("triton", dtype), ("reference", torch.float32)):
        tensors = [t.detach().to(precision).requires_grad_() for t in (x, residual)]
        with torch.autocast(device.type, enabled=False):
            out = dropout(tensors[0], samples, places, site=-(2**62) - 1, rate=0.3, residual=tensors[1], impl=impl)  # pyright: ignore[reportArgumentType]
        answers.append([out, *torch.autograd.grad(out, tensors, given.to(precision))])
    for name, ours, exact in zip(("out", "dx", "dresidual"), *answers, strict=True):
        off = float((ours.detach().float() - exact.detach()).norm() / exact.detach().norm())
        if not off <= ALLOWED[dtype]:
            return f"{name} is off by {off:.1e} of its norm, {ALLOWED[dtype]:.0e} is allowed"
    return None
