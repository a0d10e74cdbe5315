"""The kernels over rows of logits, forward and backward, against fp64: the error is at most twice that of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megalite_kernels import linear_statistics, selftest
from oracle import error
from torch.nn import functional as F

SHAPES = [(1, 1, 1), (7, 33, 1), (5, 4095, 1), (5, 4097, 1), (6, 9001, 2), (9, 300, 3)]  # tokens, words, pieces; a block has 4096 words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_statistics_and_gradients(biased: bool, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, v, pieces = shape
    torch.manual_seed(v)
    tensors = [torch.randn(n, 16).to(dtype), torch.randn(v, 16).to(dtype), *([torch.randn(v).to(dtype)] if biased else [])]
    labels = torch.randint(-v // 4 - 1, v + v // 4, (n,))  # some of other ranks
    given = torch.randn(3, n)

    def plain(*inputs: torch.Tensor) -> torch.Tensor:
        logits = F.linear(*inputs).to(torch.promote_types(inputs[0].dtype, torch.float32))
        here = (labels >= 0) & (labels < v)
        own = logits.gather(1, labels.where(here, 0)[:, None])[:, 0] * here
        return torch.stack([logits.logsumexp(1), own, logits.sum(1)])

    def kernel(*inputs: torch.Tensor) -> torch.Tensor:
        x, weight, *bias = inputs
        return linear_statistics(x, weight, bias[0] if bias else None, labels, pieces=pieces, impl="triton")

    def answers(run: Any, precision: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(precision).requires_grad_() for t in tensors]
        found = run(*inputs)
        return [t.detach().double() for t in (found, *torch.autograd.grad(found, inputs, given.to(found.dtype)))]

    for name, ours, theirs, right in zip(
        ("statistics", "dx", "dweight", "dbias"),
        answers(kernel, dtype),
        answers(plain, dtype),
        answers(plain, torch.float64),
        strict=False,
    ):
        floor = 1e-6 if dtype == torch.float32 else 1e-3
        assert error(ours, right) <= 2 * error(theirs, right) + floor, name


def test_the_self_test_passes_right_kernels_and_names_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite_kernels import rows

    monkeypatch.setattr(selftest, "ROWS", 20)
    assert selftest.disagreement_of_rows(torch.device("cpu"), torch.float32) is None
    original = rows.run_differentiate
    monkeypatch.setattr(rows, "run_differentiate", lambda logits, labels, stats, given, first: original(logits, labels, stats, given, 0))
    assert "dx is off" in str(selftest.disagreement_of_rows(torch.device("cpu"), torch.float32))
