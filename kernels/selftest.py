"""A kernel is trusted on a GPU after it agreed there with plain PyTorch, in this precision and at this head width, once a process.

What the interpreter and the compiler cannot see (asynchronous copies, descriptors, a new driver) would otherwise go into the weights. The
shape is small and ragged; both forms of the backward pass and both kinds of mask are run. A kernel that is off, or fails, is not used, and
one warning says why.
"""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product

import torch
from torch import Tensor

from .attention import attention, why_not_triton
from .spans import packed_spans

ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}  # of the 2-norm; a wrong tile is off by a tenth and more
ROWS = 333


def why_not(q: Tensor) -> str | None:
    """Why the kernels are not to be used for tensors like q; None where they are."""
    return why_not_triton(q) or _ask(str(q.device), q.dtype, q.shape[-1])


@torch.compiler.assume_constant_result
def _ask(device: str, dtype: torch.dtype, width: int) -> str | None:
    return _disagreement(device, dtype, width)


@cache
def _disagreement(device: str, dtype: torch.dtype, width: int) -> str | None:
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []), torch.inference_mode(False), torch.enable_grad():
        try:
            found = disagreement(torch.device(device), dtype, width)
        except Exception as error:  # a compiler or driver that fails has no class of its own, and must not end a training run
            found = f"it failed: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    if found:
        warnings.warn(f"fused attention is not used on {device} in {dtype} at head width {width}: {found}", stacklevel=3)
    return found


def disagreement(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The first case in which a kernel is further from fp32 PyTorch than its precision allows; None if there is none."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, ROWS, heads, width, device=device).to(dtype) for heads in (4, 2, 2)]
    dout = torch.randn(1, ROWS, 4, width, device=device).to(dtype)
    documents = packed_spans(torch.tensor([0, 70, 71, 300, ROWS], device=device), tokens=ROWS, causal=True)
    for masked, deterministic in product((False, True), (False, True)):
        mask = {"spans": documents} if masked else {"causal": True}
        answers = []
        for impl, precision in (("triton", dtype), ("reference", torch.float32)):
            tensors = [t.detach().to(precision).requires_grad_() for t in inputs]
            with torch.autocast(device.type, enabled=False):
                out = attention(*tensors, **mask, deterministic=deterministic, impl=impl)  # pyright: ignore[reportArgumentType]
            assert isinstance(out, Tensor)
            answers.append([out, *torch.autograd.grad(out, tensors, dout.to(precision))])
        for name, ours, exact in zip(("out", "dq", "dk", "dv"), *answers, strict=True):
            off = float((ours.detach().float() - exact.detach()).norm() / exact.detach().norm())
            if not off <= ALLOWED[dtype]:
                form = f"{'documents' if masked else 'causal'}, {'deterministic' if deterministic else 'fast'}"
                return f"{name} is off by {off:.1e} of its norm, {ALLOWED[dtype]:.0e} is allowed ({form})"
    return None
