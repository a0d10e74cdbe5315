"""`attention` on a CPU: the plain PyTorch form, what it refuses and what it says."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from megalite_kernels import attention
from megalite_kernels.attention import _say_once
from megalite_kernels.randomness import Draws, draw, kept
from megalite_kernels.spans import packed_spans
from torch.nn import functional as F


def _inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_it_computes_what_sdpa_computes(causal: bool) -> None:
    q, k, v = _inputs(2, 33, 4, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, causal=causal, impl="reference"), expected)


def test_packed_documents_are_computed_as_if_alone() -> None:
    q, k, v = _inputs(30, 4, 16, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 12, 30])
    together = attention(q, k, v, cu_seqlens=cu_seqlens, causal=True, impl="reference")
    alone = [attention(q[a:b], k[a:b], v[a:b], causal=True, impl="reference") for a, b in ((0, 12), (12, 30))]
    torch.testing.assert_close(together, torch.cat(alone))  # type: ignore[arg-type]


def test_a_cpu_gets_pytorch_and_is_told_why_once() -> None:
    _say_once.cache_clear()
    q, k, v = _inputs(1, 8, 2, 16)
    with pytest.warns(UserWarning, match="need a GPU, and q is on cpu"):
        attention(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, k, v)
        attention(q, k, v, impl="reference")


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite_kernels.attention import _why_not_on

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "sm75" in str(_why_not_on.__wrapped__("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _why_not_on.__wrapped__("cuda:0") is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q": torch.zeros(2, 8, 3, 16)}, "3 query heads are no multiple of 2"),
        ({"q": torch.zeros(2, 8, 2, 8)}, "differ in batch, tokens or head width"),
        ({"q": torch.zeros(8, 2, 16)}, "give \\(b, s, h, k\\)"),
        ({"q": torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16)}, "one dtype"),
        ({"scale": -1.0}, "scale = -1.0"),
        ({"softcap": -1.0}, "softcap = -1.0"),
        ({"dropout_p": 1.0}, "dropout_p = 1.0"),
        ({"dropout_p": 0.1, "draws": Draws(*torch.zeros(2, 2, 2, 7, dtype=torch.int32))}, "draws.rows is \\(2, 2, 7\\) torch.int32"),
        ({"window": 0}, "window = 0"),
        ({"sink": torch.zeros(3)}, "sink \\(3,\\)"),
        ({"key_lengths": torch.tensor([1, 2, 3])}, "key_lengths \\(3,\\)"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "packed"),
        ({"spans": packed_spans(torch.tensor([0, 8]), tokens=8, causal=False), "causal": True}, "the whole mask"),
        ({"spans": packed_spans(torch.tensor([0, 9]), tokens=9, causal=False)}, "spans.lo"),
        ({"impl": "triton"}, "impl = triton, but"),
        ({"impl": "cudnn"}, "impl = 'cudnn'"),
    ],
    ids=lambda x: None if isinstance(x, str) else "+".join(x),
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(2, 8, 2, 16) for name in ("q", "k", "v")} | {"impl": "reference"} | change
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=words) as raised:
        attention(q, k, v, **given)
    assert "\n" not in str(raised.value)


def test_dropout_is_even_and_independent() -> None:
    """Rates, and correlations between neighbours along every dim, within five standard deviations."""
    torch.manual_seed(4)
    shape, p = (2, 3, 256, 320), 0.3
    left = 1 - kept(draw(*shape, device=torch.device("cpu")), dropout_p=p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(left.mean() - p) < 5 * deviation / left.numel() ** 0.5
    for dim, size in ((2, 320), (3, 256)):
        assert (left.mean(dim) - p).abs().max() < 6 * deviation / (shape[dim]) ** 0.5, f"uneven along {dim}, {size}"
    z = (left - p) / deviation
    for dim in range(4):
        pairs = z.narrow(dim, 1, shape[dim] - 1) * z.narrow(dim, 0, shape[dim] - 1)
        assert pairs.mean().abs() < 5 / pairs.numel() ** 0.5
    corners = z[:, :, 1:, 1:] * z[:, :, :-1, 1:] * z[:, :, 1:, :-1] * z[:, :, :-1, :-1]  # four draws of two rows and two keys
    assert corners.mean().abs() < 5 / corners.numel() ** 0.5


def test_a_seed_draws_the_same_again_and_two_seeds_draw_differently() -> None:
    def drawn(seed: int, calls: int = 1) -> torch.Tensor:
        torch.manual_seed(seed)
        for _ in range(calls):
            draws = draw(1, 2, 64, 64, device=torch.device("cpu"))
        return kept(draws, dropout_p=0.5)

    assert torch.equal(drawn(1), drawn(1))
    for other in (drawn(3), drawn(1, calls=2)):
        assert abs(float((drawn(1) == other).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("packed", [False, True])
def test_given_draws_decide_what_is_dropped(packed: bool) -> None:
    torch.manual_seed(5)
    q, k, v = (torch.randn(1, 9, heads, 16) for heads in (4, 2, 2))
    draws = draw(1, 4, 9, 9, device=q.device)
    given = (q[0], k[0], v[0]) if packed else (q, k, v)
    ours = attention(*given, dropout_p=0.4, draws=draws, impl="reference")
    scores = torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(2, 2)) / 4
    weights = scores.softmax(-1) * kept(draws, dropout_p=0.4) / 0.6
    truth = torch.einsum("bhij,bjhk->bihk", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(ours, truth[0] if packed else truth)


def test_nothing_needs_triton_on_a_cpu() -> None:
    code = "import sys, torch; sys.modules['triton'] = None; from megalite_kernels import attention; x = torch.ones(1, 4, 2, 16); "
    subprocess.run([sys.executable, "-c", code + "assert attention(x, x, x).equal(x)"], check=True)
