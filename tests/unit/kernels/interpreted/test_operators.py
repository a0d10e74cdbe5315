"""The operators under torch.compile, checkpointing, FakeTensor, autocast and the FLOP counter: the same numbers as eager."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megalite_kernels import Spans, attention
from megalite_kernels.randomness import draw
from megalite_kernels.spans import packed_spans
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

FORWARD = torch.ops.megalite.attention_forward.default
SPANS = packed_spans(torch.tensor([0, 20, 50]), tokens=50, causal=True)


def _inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 50, h, 32, requires_grad=True) for h in (4, 2, 2)]


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    out = attention(q, k, v, spans=spans, softcap=3.0, impl="triton")
    assert isinstance(out, Tensor)
    return out.sin()


def _gradients(run: Any) -> list[Tensor]:
    inputs = _inputs()
    out = run(*inputs, SPANS)
    return [out, *torch.autograd.grad(out.sum(), inputs)]


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == FORWARD else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = partial(create_selective_checkpoint_contexts, _keep_attention)
WAYS = {
    "compiled": lambda: torch.compile(attend, fullgraph=True, backend="aot_eager"),
    "compiled by inductor": lambda: torch.compile(attend, fullgraph=True),
    "checkpointed": lambda: partial(checkpoint, attend, use_reentrant=False),
    "checkpointed, attention saved": lambda: partial(checkpoint, attend, use_reentrant=False, context_fn=SELECTIVE),
    "compiled, attention saved": lambda: torch.compile(
        lambda *x: checkpoint(attend, *x, use_reentrant=False, context_fn=SELECTIVE), fullgraph=True, backend="aot_eager"
    ),
}


# inductor calls a C++ compiler, for a minute
@pytest.mark.parametrize("way", [pytest.param(way, marks=(pytest.mark.slow,) if "inductor" in way else ()) for way in WAYS])
def test_every_way_to_run_gives_the_numbers_of_eager(way: str) -> None:
    for ours, eager in zip(_gradients(WAYS[way]()), _gradients(attend), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_spans_are_built_inside_a_compiled_graph() -> None:
    lengths = torch.tensor([20, 50])
    run = lambda q, k, v: attention(q, k, v, key_lengths=lengths, impl="triton")  # noqa: E731
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*_inputs()), run(*_inputs()))


def test_a_selective_checkpoint_runs_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite_kernels import launch

    runs: list[int] = []
    original = launch.run_forward
    monkeypatch.setattr(launch, "run_forward", lambda *args, **kw: runs.append(1) or original(*args, **kw))
    _gradients(WAYS["checkpointed"]())
    assert len(runs) == 2
    _gradients(WAYS["checkpointed, attention saved"]())
    assert len(runs) == 3


def test_dropout_is_the_same_when_a_checkpoint_runs_again() -> None:
    drop = lambda q, k, v: attention(q, k, v, dropout_p=0.5, impl="triton")  # noqa: E731
    answers = []
    for run in (drop, partial(checkpoint, drop, use_reentrant=False)):
        inputs = _inputs()
        torch.manual_seed(9)
        out = run(*inputs)
        answers.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for plain, again in zip(*answers, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("features", ["spans", *(pytest.param(name, marks=pytest.mark.long) for name in ("plain", "sink and dropout"))])
def test_opcheck_finds_nothing(features: str) -> None:
    q, k, v = _inputs()
    spans = SPANS if features == "spans" else (None,) * 4
    sink = torch.zeros(4, requires_grad=True) if "sink" in features else None
    draws, dropout_p = (draw(2, 4, 50, 50, device=q.device), 0.2) if "dropout" in features else ((None, None), 0.0)
    torch.library.opcheck(FORWARD, (q, k, v, *spans, sink, *draws, -100, 100, 0.2, 0.0, dropout_p, True))


@pytest.mark.parametrize("packed", [False, True])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(packed: bool) -> None:
    shape = (50, 32) if packed else (2, 50, 32)
    make = lambda h: torch.randn(*shape[:-1], h, shape[-1])  # noqa: E731
    run = lambda: attention(make(4), make(2), make(2), causal=True, return_lse=True, impl="triton")  # noqa: E731
    with FakeTensorMode():
        fake = run()
    for ours, real in zip(fake, run(), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_decides_the_precision(impl: Any) -> None:
    with torch.autocast("cpu", dtype=torch.float16):
        out, lse = attention(*_inputs(), return_lse=True, impl=impl)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32


def test_flops_count_what_is_seen() -> None:
    q, k, v = _inputs()
    pairs = {"all": 50 * 50, "causal": 50 * 51 // 2, "spans": 20 * 21 // 2 + 30 * 31 // 2}
    for name, options in {"all": {}, "causal": {"causal": True}, "spans": {"spans": SPANS}}.items():
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, impl="triton", **options).sum().backward()  # type: ignore[union-attr, arg-type]
        one = 2 * 2 * 4 * 32 * pairs[name]  # batch, heads, width; a product is 2 FLOPs a pair
        assert counter.get_total_flops() == (2 + 5) * one, name
