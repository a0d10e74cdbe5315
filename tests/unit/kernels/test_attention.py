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
from megalite_kernels.randomness import draw_seed, kept, philox
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


def test_philox_is_philox() -> None:
    """The known answers that come with the paper's library (Random123)."""
    as_int = lambda *words: tuple(torch.tensor(word) for word in words)  # noqa: E731
    assert philox(torch.tensor(0), as_int(0, 0, 0, 0)) == 0x6627E8D5
    assert philox(torch.tensor(-1), as_int(*[0xFFFFFFFF] * 4)) == 0x408F276D


def test_dropout_is_even_and_independent() -> None:
    """Rates, and correlations between neighbours along every dim, within five standard deviations."""
    torch.manual_seed(4)
    shape, p = (2, 3, 256, 320), 0.3
    left = 1 - kept(draw_seed(torch.device("cpu")), shape=shape, dropout_p=p).double()
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


def test_two_seeds_draw_differently() -> None:
    draw = lambda *rng: kept(torch.tensor(rng), shape=(1, 2, 64, 64), dropout_p=0.5).double()  # noqa: E731
    same, seed, offset = draw(1, 2), draw(3, 2), draw(1, 4)
    assert torch.equal(same, draw(1, 2))
    for other in (seed, offset):
        assert abs(float((same == other).double().mean()) - 0.5) < 0.05


def test_nothing_needs_triton_on_a_cpu() -> None:
    code = "import sys, torch; sys.modules['triton'] = None; from megalite_kernels import attention; x = torch.ones(1, 4, 2, 16); "
    subprocess.run([sys.executable, "-c", code + "assert attention(x, x, x).equal(x)"], check=True)
