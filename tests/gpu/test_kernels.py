"""Fused attention, cross-entropy and dropout on a GPU: as right as PyTorch, the same bits when deterministic, no waiting. `make gpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from megalite_kernels import attention, draws, dropout, linear_cross_entropy
from megalite_kernels.selftest import disagreement, disagreement_of_dropout, disagreement_of_rows, why_not
from megalite_kernels.spans import packed_spans
from torch.nn import functional as F

from megalite.config import Model
from megalite.models.attention import attend, with_spans

sys.path.insert(0, str(Path(__file__).parent.parent / "unit/kernels/interpreted"))
from training import FAMILIES, config_of, distance, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def known_gpu() -> None:
    if reason := why_not(torch.empty(0, 64, device=GPU, dtype=torch.bfloat16)):
        pytest.fail(reason)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 192, 256])
def test_every_width_and_precision_agrees_with_fp32(width: int, dtype: torch.dtype, dropout: bool) -> None:
    assert disagreement(GPU, dtype, width, dropout=dropout) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_the_error_is_at_most_a_fifth_above_that_of_flash(width: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 2048, 8, width, device=GPU, dtype=torch.bfloat16) for _ in range(4))

    def gradients(run: object, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = run(*inputs)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)

    exact = gradients(lambda q, k, v: attention(q, k, v, causal=causal, impl="reference"), torch.float64)
    ours = gradients(lambda q, k, v: attention(q, k, v, causal=causal, impl="triton"), torch.bfloat16)
    theirs = gradients(flash, torch.bfloat16)
    for name, a, b, right in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        off, peer = ((t.double() - right).norm() / right.norm() for t in (a, b))
        assert off <= 1.2 * peer, f"{name}: ours is off by {off:.2e}, flash by {peer:.2e}"


def test_the_deterministic_form_gives_the_same_bits_200_times() -> None:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 4096, 8, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    first = None
    for _ in range(200):
        out = attention(q, k, v, causal=True, deterministic=True, impl="triton")
        bits = torch.autograd.grad(out, (q, k, v), dout)  # type: ignore[arg-type]
        first = first or bits
        assert all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))


@pytest.mark.parametrize("feature", [{"dropout_p": 0.2}, {"softcap": 20.0}, {"window": 100}, {"sink": True}], ids=lambda f: next(iter(f)))
@pytest.mark.parametrize("deterministic", [False, True])
def test_features_agree_with_the_reference(feature: dict[str, object], deterministic: bool) -> None:
    answers = []
    for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float32)):
        torch.manual_seed(1)
        inputs = [torch.randn(2, 700, h, 64, device=GPU).to(torch.bfloat16).to(dtype).requires_grad_() for h in (4, 2, 2)]
        options = dict(feature)
        if "sink" in options:
            options["sink"] = torch.zeros(4, device=GPU)
        torch.manual_seed(2)
        out = attention(*inputs, causal=True, deterministic=deterministic, impl=impl, **options)  # type: ignore[arg-type]
        answers.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])  # type: ignore[union-attr]
    for ours, exact in zip(*answers, strict=True):
        assert float((ours.float() - exact).norm() / exact.norm()) < 2e-2  # type: ignore[union-attr]


def test_nothing_waits_for_the_host() -> None:
    """A graph can be captured: no value is read back, from the ends of the documents to the gradients."""
    q, k, v = (torch.randn(1024, 4, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    ends = torch.tensor([0, 300, 1024], device=GPU)
    run = lambda: attention(q, k, v, spans=packed_spans(ends, tokens=1024, causal=True), impl="triton")  # noqa: E731
    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, expected)  # type: ignore[arg-type]


def test_a_batch_carries_the_mask_that_attend_hands_to_the_kernels() -> None:
    q, k, v = (torch.randn(2, 256, h, 64, device=GPU, dtype=torch.bfloat16) for h in (4, 2, 2))
    lengths, model = torch.tensor([100, 256], device=GPU), Model(family="bert", activation="gelu", width=256, heads=4)
    batch = with_spans({"ids": torch.zeros(2, 256, device=GPU), "length": lengths}, model=model, dtype=torch.bfloat16)
    ours = attend(q, k, v, causal=False, lengths=lengths, spans=batch["spans"])
    assert torch.equal(ours, attend(q, k, v, causal=False, lengths=lengths))
    on_cpu = attend(*(t.float().cpu() for t in (q, k, v)), causal=False, lengths=lengths.cpu())
    assert float((ours.float().cpu() - on_cpu).norm() / on_cpu.norm()) < 1e-2


@pytest.mark.parametrize(("family", "dropout"), [*((family, 0.0) for family in FAMILIES), ("bert", 0.1)])
def test_training_through_the_kernels_is_as_near_to_fp32_as_training_through_pytorch(family: str, dropout: float) -> None:
    """Twenty steps in bf16; losses and gradients of all steps, the error against fp32 at most twice that of PyTorch."""
    config = config_of(family, sequence=512, width=256, heads=4, layers=4, samples=4, dropout=dropout)
    ours, theirs = (train(config, fused=fused, dtype=torch.bfloat16, device="cuda") for fused in (True, False))
    exact = train(config, fused=False, device="cuda")
    assert exact[0][-1] < 0.9 * exact[0][0], "nothing was learned"
    for what, mine, peer, right in zip(("losses", "gradients"), ours, theirs, exact, strict=True):
        off, allowed = distance(mine, right), 2 * max(distance(peer, right), 2**-8)
        assert off <= allowed, f"{what} are off by {off:.2e}, {allowed:.2e} is allowed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_dropout_drops_what_a_cpu_drops(dtype: torch.dtype) -> None:
    assert disagreement_of_dropout(GPU, dtype) is None
    x, samples, places = torch.ones(3, 50, 1037, dtype=dtype), torch.tensor([2**62, -5, 7]), torch.arange(50)
    on_cpu = dropout(x, samples, places, site=-(2**62), rate=0.3)
    on_gpu = dropout(x.to(GPU), samples.to(GPU), places.to(GPU), site=-(2**62), rate=0.3, impl="triton")
    assert torch.equal(on_gpu.cpu(), on_cpu)
    theirs, ours = (draws(samples.to(where), places[:4].to(where), 1030, site=-7) for where in ("cpu", GPU))
    assert all(torch.equal(mine.cpu(), other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_cross_entropy_agrees_with_fp32(dtype: torch.dtype) -> None:
    assert disagreement_of_rows(GPU, dtype) is None


def test_fused_cross_entropy_needs_an_eighth_of_the_logits() -> None:
    """Vocabulary 128k, 8k tokens, width 4096, bf16; the gradients of input and weight not counted, which any way needs."""
    x, weight = (torch.randn(n, 4096, device=GPU, dtype=torch.bfloat16, requires_grad=True) for n in (8192, 131072))
    labels = torch.randint(0, 131072, (8192,), device=GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(linear_cross_entropy(x, weight, labels, pieces=32).mean(), (x, weight))
    gradients = x.nbytes + weight.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= 8192 * 131072 * 4 / 8
