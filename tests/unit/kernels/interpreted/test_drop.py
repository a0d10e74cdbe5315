"""The kernel of dropout: bit for bit the mask of PyTorch's form, in any strides, and gradients by the same mask that nobody kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megalite_kernels import draws, dropout, selftest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

SITE = -(2**63) + 12345


def _inputs(width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(width)
    return [torch.randn(2, 7, width).to(dtype).requires_grad_() for _ in range(2)]


def _run(x: Tensor, residual: Tensor | None, *, impl: Any = "triton", rate: float = 0.3, places: Tensor | None = None) -> Tensor:
    samples = torch.tensor([2**62 + 3, -(2**61)])
    return dropout(x, samples, torch.arange(7) if places is None else places, site=SITE, rate=rate, residual=residual, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 64, 1023, 1030])
def test_it_drops_what_pytorch_drops_and_goes_back_the_same_way(width: int, dtype: torch.dtype) -> None:
    x, residual = _inputs(width, dtype)
    ours, plain = _run(x, residual), _run(x, residual, impl="reference")
    # PyTorch rounds the product to fp16 before it is added, the kernel the sum alone; in fp32 both round each
    off = 0.0 if dtype == torch.float32 else 2.0**-10 * float(x.detach().abs().max()) / 0.7
    torch.testing.assert_close(ours, plain, rtol=0, atol=off)
    given = torch.randn(2, 7, width).to(dtype)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, residual), given) for out in (ours, plain)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rate", [0.0, 2**-16, 0.5, 1 - 2**-16])
def test_the_mask_is_the_same_at_every_rate(rate: float) -> None:
    ones = torch.ones(2, 7, 512)
    assert torch.equal(_run(ones, None, rate=rate), _run(ones, None, rate=rate, impl="reference"))


def test_operands_may_lie_in_any_strides() -> None:
    wide = torch.randn(7, 96, 4)
    x, residual = wide[..., :2].permute(2, 0, 1), torch.randn(96).expand(2, 7, 96)
    places = torch.arange(28).view(14, 2).t()[:, ::2]  # (2, 7)
    assert not x.is_contiguous() and not places.is_contiguous()
    torch.testing.assert_close(_run(x, residual, places=places), _run(x, residual, places=places, impl="reference"))


def test_nothing_is_kept_and_nobody_drops_again_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite_kernels import drop

    (x, residual), seen, calls, original = _inputs(64), [], [], drop.run
    monkeypatch.setattr(drop, "run", lambda *given, **others: calls.append(1) or original(*given, **others))
    with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        _run(x, residual)
    assert not seen
    checkpoint(lambda x, residual: _run(x.exp(), residual), x, residual, use_reentrant=False).sum().backward()
    assert len(calls) == 1 + 2, "forward, forward, and back"


@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
def test_every_way_to_run_gives_the_numbers_of_eager(way: str) -> None:
    x, residual = _inputs(40)
    run = torch.compile(_run, fullgraph=True, backend="aot_eager") if way == "compiled" else partial(checkpoint, _run, use_reentrant=False)
    answers = [(out, *torch.autograd.grad(out.sin().sum(), (x, residual))) for out in (run(x, residual), _run(x, residual))]
    for ours, eager in zip(*answers, strict=True):
        torch.testing.assert_close(ours, eager)


def test_the_residual_may_be_of_another_precision() -> None:
    x, residual = _inputs(40)
    off = 2.0**-11 * float(x.detach().abs().max()) / 0.7  # PyTorch rounds the product to fp16, the kernel nothing
    torch.testing.assert_close(_run(x.half(), residual), _run(x.half(), residual, impl="reference"), rtol=0, atol=off)


@pytest.mark.parametrize("site", [0, -1, 2**40, SITE])
def test_attention_draws_what_pytorch_draws(site: int) -> None:
    samples, heads = torch.tensor([2**62 + 3, -(2**61)]), torch.tensor([7, 0, 2**20])
    ours, plain = (draws(samples, heads, 1030, site=site, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(ours.rows, plain.rows) and torch.equal(ours.keys, plain.keys)
    assert ours.rows.is_contiguous() and ours.rows.dtype == torch.int32


def test_opcheck_finds_nothing() -> None:
    x, residual = _inputs(40)
    for beside in (residual, None):
        torch.library.opcheck(
            torch.ops.megalite.dropout.default, (x, torch.tensor([1, 2]), torch.arange(7).expand(2, 7), beside, SITE, 20000)
        )
    torch.library.opcheck(torch.ops.megalite.draws.default, (torch.tensor([1, 2]), torch.arange(3), 40, SITE))


def test_the_self_test_passes_a_right_kernel_and_names_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite_kernels import drop

    monkeypatch.setattr(selftest, "ROWS", 5)
    assert selftest.disagreement_of_dropout(torch.device("cpu"), torch.float32) is None
    original = drop.run
    monkeypatch.setattr(drop, "run", lambda *given, site, **others: original(*given, site=site + 1, **others))
    assert "draws from are others" not in (said := str(selftest.disagreement_of_dropout(torch.device("cpu"), torch.float32)))
    assert "out is off" in said
    original_draw = drop.run_draw
    monkeypatch.setattr(drop, "run_draw", lambda *given: original_draw(*given) + 1)
    assert "draws from are others" in str(selftest.disagreement_of_dropout(torch.device("cpu"), torch.float32))
