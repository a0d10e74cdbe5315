"""Cross-entropy in pieces of the vocabulary: what PyTorch says of all logits at once, and never all of them in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from megalite_kernels import linear_cross_entropy, linear_statistics
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from megalite.tune.ledger import Ledger


def _inputs(n: int = 20, d: int = 12, v: int = 37, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(n + v)
    tensors = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((n, d), (v, d), (v,))]
    return tensors, torch.randint(0, v, (n,)).masked_fill(torch.rand(n) < 0.3, -100)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("pieces", [1, 2, 5, 37])
@pytest.mark.parametrize("biased", [False, True])
def test_losses_and_gradients_are_those_of_all_logits(biased: bool, pieces: int, z_loss: float, smoothing: float) -> None:
    (x, weight, bias), labels = _inputs()
    given = bias if biased else None
    ours = linear_cross_entropy(x, weight, labels, bias=given, label_smoothing=smoothing, z_loss=z_loss, pieces=pieces)
    logits = F.linear(x, weight, given)
    plain = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    plain = plain + (z_loss * logits.logsumexp(1).square()).masked_fill(labels == -100, 0)
    torch.testing.assert_close(ours, plain)
    factors = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    inputs = [x, weight, *([bias] if biased else [])]
    for mine, theirs in zip(torch.autograd.grad(ours @ factors, inputs), torch.autograd.grad(plain @ factors, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_statistics_of_parts_of_a_vocabulary_join_to_those_of_all() -> None:
    (x, weight, bias), labels = _inputs()
    whole = linear_statistics(x, weight, bias, labels, pieces=3)
    left, right = (linear_statistics(x, weight[a:b], bias[a:b], labels, first=a, pieces=2) for a, b in ((0, 17), (17, 37)))
    torch.testing.assert_close(torch.stack([torch.logaddexp(left[0], right[0]), *(left + right)[1:]]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_are_at_most_twice_those_of_pytorch(dtype: torch.dtype) -> None:
    exact, labels = _inputs(64, 32, 300)
    rounded = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    loss = linear_cross_entropy(*rounded[:2], labels, bias=rounded[2], pieces=4).sum()
    plain = F.cross_entropy(F.linear(*rounded).float(), labels, reduction="sum")
    right = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    gradients = [torch.autograd.grad(value, inputs) for value, inputs in ((loss, rounded), (plain, rounded), (right, exact))]
    for ours, theirs, truth in zip(*gradients, strict=True):
        off, allowed = (float((t.double() - truth).norm() / truth.norm()) for t in (ours, theirs))
        assert off <= 2 * allowed + 1e-7


def test_no_allocation_is_as_large_as_the_logits() -> None:
    (x, weight, bias), labels = _inputs(256, 4, 800, torch.float32)
    largest = {}
    for pieces in (1, 16):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            linear_cross_entropy(x, weight, labels, bias=bias, pieces=pieces).sum().backward()
        largest[pieces] = max(event.cpu_memory_usage for event in seen.events() if event.name.startswith("aten::"))
    logits = 256 * 800 * 4
    assert largest[1] >= logits and largest[16] <= logits / 8


def test_a_piece_is_let_go_before_the_next_one_is_made() -> None:
    """In both passes; what else is made is less than a piece."""
    (x, weight, _), labels = _inputs(256, 4, 2048, torch.float32)
    with Ledger() as ledger:
        statistics = linear_statistics(x, weight, None, labels, pieces=16)
        forward = ledger.peak["cpu"]
        torch.autograd.grad(statistics.sum(), (x, weight))
    piece = 256 * 2048 * 4 // 16
    assert piece <= forward < 2 * piece and piece <= ledger.peak["cpu"] < 2 * piece


def test_one_piece_is_kept_in_aligned_rows_and_goes_back_once() -> None:
    (x, weight, bias), labels = _inputs(dtype=torch.float32)
    statistics = linear_statistics(x, weight, bias, labels, pieces=1)
    kept = statistics.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
    assert kept.shape == (20, 37) and kept.stride() == (64, 1)
    torch.testing.assert_close(kept, F.linear(x, weight, bias))
    torch.autograd.grad(statistics.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(statistics.sum(), x)


def test_opcheck_finds_nothing_and_products_are_counted() -> None:
    (x, weight, bias), labels = _inputs(dtype=torch.float32)
    logits = F.linear(x, weight).detach()
    torch.library.opcheck(torch.ops.megalite.logit_statistics.default, (logits, labels, 0, False))
    torch.library.opcheck(torch.ops.megalite.logit_gradient.default, (logits, labels, *torch.rand(2, 3, 20), 0, False))
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, labels, bias=bias).sum().backward()
    assert counter.get_total_flops() == (2 + 6) * 20 * 12 * 8 * 64  # words of each piece, padded
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, labels, bias=bias, pieces=1).sum().backward()
    assert counter.get_total_flops() == (2 + 4) * 20 * 12 * 64


def test_it_compiles_to_one_graph() -> None:
    (x, weight, _), labels = _inputs(dtype=torch.float32)
    run = torch.compile(lambda x: linear_cross_entropy(x, weight, labels, z_loss=0.1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), linear_cross_entropy(x, weight, labels, z_loss=0.1))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(3, 4, 5)}, "give \\(n, d\\)"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "int64 labels"),
        ({"pieces": 8}, "pieces = 8 of 7 words"),
        ({"weight": torch.zeros(7, 4, dtype=torch.float16)}, "one floating dtype"),
        ({"label_smoothing": 1.5}, "label_smoothing = 1.5"),
        ({"z_loss": -1.0}, "z_loss = -1.0"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.int64), "pieces": 2}
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**(copy.copy(given) | change))
