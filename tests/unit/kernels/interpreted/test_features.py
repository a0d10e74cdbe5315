"""Soft cap, sinks, dropout, scale, LSE, head widths, strides and descriptors, forward and backward, against fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from megalite_kernels import attention, launch, selftest
from megalite_kernels.randomness import draw, kept
from megalite_kernels.spans import FAR, band, packed_spans
from megalite_kernels.tables import Tile
from oracle import grid, judge
from torch import Tensor

LONG, SLOW = pytest.mark.long, pytest.mark.slow
FORMS = pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=LONG)], ids=["fast", "deterministic"])


def _inputs(rows: int, keys: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(rows + width)
    return [torch.randn(2, s, h, width, dtype=dtype) for s, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads))]


def _causal(rows: int, keys: int) -> Tensor:
    i, j = grid(rows, keys)
    return (j <= i + keys - rows)[None].expand(2, rows, keys)


@pytest.mark.parametrize(
    ("causal", "deterministic"),
    [(True, False), pytest.param(False, True, marks=LONG), *(pytest.param(both, both, marks=SLOW) for both in (False, True))],
)
@pytest.mark.parametrize(
    "features", [c for n in (1, 2, 4) for c in itertools.combinations(("softcap", "sink", "dropout", "dlse"), n)], ids="+".join
)
def test_features_and_their_gradients(features: tuple[str, ...], causal: bool, deterministic: bool) -> None:
    inputs = _inputs(70, 70, 2, 1, 32)
    mask = _causal(70, 70) if causal else torch.ones(2, 70, 70, dtype=torch.bool)
    options: dict[str, Any] = {"scale": 0.3}
    if "softcap" in features:
        options["softcap"] = 1.5
    if "sink" in features:
        inputs.append(torch.tensor([0.5, -1.0]))
    given = dict(options)
    if "dropout" in features:
        torch.manual_seed(7)
        options["keep"] = kept(draw(2, 2, 70, 70, device=torch.device("cpu")), dropout_p=0.3) / 0.7
        given["dropout_p"] = 0.3

    def kernel(q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        return attention(  # type: ignore[return-value]
            q, k, v, causal=causal, sink=sink[0] if sink else None, deterministic=deterministic, return_lse=True, impl="triton", **given
        )

    judge(kernel, inputs, mask, dlse="dlse" in features, options=options)


@FORMS
@pytest.mark.parametrize("width", [1, 16, 24, 48, 96, 192, 256])
def test_any_head_width(width: int, deterministic: bool) -> None:
    inputs = _inputs(40, 50, 2, 1, width)
    judge(
        lambda q, k, v: attention(q, k, v, causal=True, deterministic=deterministic, return_lse=True, impl="triton"),
        inputs,
        _causal(40, 50),
        options={"scale": width**-0.5},
    )


@FORMS
@pytest.mark.parametrize("how", ["slices of a fused projection", "heads first", "every other row", "width not innermost"])
def test_strides_are_read_in_place(how: str, deterministic: bool) -> None:
    torch.manual_seed(3)
    if how == "slices of a fused projection":
        q, k, v = torch.randn(2, 50, 8, 32).split([4, 2, 2], dim=2)
    elif how == "heads first":
        q, k, v = (torch.randn(2, h, 50, 32).transpose(1, 2) for h in (4, 2, 2))
    elif how == "every other row":
        q, k, v = (torch.randn(2, 100, h, 32)[:, ::2] for h in (4, 2, 2))
    else:
        q, k, v = (torch.randn(2, 50, 32, h).mT for h in (4, 2, 2))
    run = lambda q, k, v: attention(q, k, v, causal=True, deterministic=deterministic, return_lse=True, impl="triton")  # noqa: E731
    strided = [t.detach().requires_grad_() for t in (q, k, v)]
    plain = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    dout = torch.randn(2, 32, 50, 4).permute(0, 2, 3, 1)  # an incoming gradient with strides of its own
    out, expected = run(*strided)[0], run(*plain)[0]
    assert torch.equal(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out, strided, dout), torch.autograd.grad(expected, plain, dout.contiguous()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("descriptor_sums")
@FORMS
@pytest.mark.parametrize("spans", [False, True], ids=["band", "spans"])
@pytest.mark.parametrize(
    "layout", [pytest.param("contiguous", marks=SLOW), "fused projection", pytest.param("no descriptor can read it", marks=LONG)]
)
def test_tiles_loaded_by_descriptor_give_the_same_bits(layout: str, spans: bool, deterministic: bool) -> None:
    """Two sequences of 70 rows: tiles of 64 run over the end of the first into the second."""
    torch.manual_seed(11)
    if layout == "fused projection":
        q, k, v = torch.randn(2, 70, 8, 32).split([4, 2, 2], dim=2)
    elif layout == "contiguous":
        q, k, v = (torch.randn(2, 70, h, 32) for h in (4, 2, 2))
    else:
        q, k, v = (torch.randn(2, h, 70, 32).transpose(1, 2) for h in (4, 2, 2))
    mask = packed_spans(torch.tensor([0, 20, 70]), tokens=70, causal=True) if spans else None
    low, high = (-FAR, FAR) if spans else band(70, 70, causal=True)
    x, call = launch.Operands(q, k, v, mask), launch.Call(low, high, 0.2, deterministic=deterministic)
    kernels = ("forward", "by_keys_fused", "by_keys", "by_rows")
    dout, answers = torch.randn(2, 70, 4, 32), []
    for descriptor in (False, True):
        tiles = {kernel: Tile(64, 32, 4, 1, descriptor) for kernel in kernels}
        out, lse = launch.run_forward(x, call, chosen=tiles)
        answers.append((out, lse, *launch.run_backward(dout, None, out, lse, x, call, chosen=tiles)))
    for pointer, described in zip(*answers, strict=True):
        assert torch.equal(pointer, described)


@pytest.mark.parametrize(
    "rows, keys",
    [
        (16, 16),
        *(pytest.param(*tile, marks=LONG) for tile in ((64, 16), (32, 128))),
        *(pytest.param(*tile, marks=SLOW) for tile in ((16, 64), (128, 32))),
    ],
)
def test_no_result_hangs_on_the_tile(rows: int, keys: int) -> None:
    torch.manual_seed(rows)
    q, k, v, dout = (torch.randn(1, 135, h, 32) for h in (2, 1, 1, 2))
    mask = packed_spans(torch.tensor([3, 60, 130]), tokens=135, causal=True)
    x = launch.Operands(q, k, v, mask, draws=draw(1, 2, 135, 135, device=q.device))
    answers = []
    for tile in (Tile(64, 64, 4, 1), Tile(rows, keys, 4, 1)):
        for deterministic in (False, True):
            call = launch.Call(-FAR, FAR, 0.2, dropout_p=0.2, deterministic=deterministic)
            tiles = dict.fromkeys(("forward", "by_keys_fused", "by_keys", "by_rows"), tile)
            out, lse = launch.run_forward(x, call, chosen=tiles)
            answers.append((out, lse, *launch.run_backward(dout, None, out, lse, x, call, chosen=tiles)))
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_lies_in_an_empty_row_never_counts() -> None:
    """Rows and keys that the mask leaves out may hold anything finite."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 60, 2, 32) for _ in range(3))
    spans = packed_spans(torch.tensor([10, 30, 50]), tokens=60, causal=False)
    loud = [t.clone() for t in (q, k, v)]
    for t in loud:
        t[:, :10] = 3e4
        t[:, 50:] = -3e4
    quiet, noisy = (attention(*tensors, spans=spans, impl="triton") for tensors in ((q, k, v), loud))
    assert torch.equal(quiet[:, 10:50], noisy[:, 10:50])  # type: ignore[index]
    assert not noisy[:, :10].any() and not noisy[:, 50:].any()  # type: ignore[index]


def test_the_deterministic_form_gives_the_same_bits_and_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = launch.run_backward
    monkeypatch.setattr(launch, "run_backward", lambda *args, **kw: seen.append(args[5].deterministic) or original(*args, **kw))
    q, k, v = (torch.randn(1, 40, 2, 32, requires_grad=True) for _ in range(3))
    for switch in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda switch=switch: switch)
        attention(q, k, v, impl="triton").sum().backward()  # type: ignore[union-attr]
    attention(q, k, v, impl="triton", deterministic=False).sum().backward()  # type: ignore[union-attr]
    assert seen == [False, True, False]


def test_the_self_test_passes_right_kernels_and_names_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(selftest, "ROWS", 150)
    documents = torch.tensor([0, 70, 71, 130, 150])
    monkeypatch.setattr(selftest, "packed_spans", lambda _, **kw: packed_spans(documents, **kw))
    assert selftest.disagreement(cpu, torch.float32, 32, dropout=True) is None
    original = launch.run_backward

    def wrong(dout: Tensor, dlse: Any, out: Tensor, lse: Tensor, x: Any, call: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = original(dout, dlse, out, lse, x, call)
        if x.spans is not None and call.deterministic:
            dk[:, -16:] = 0  # a last tile that was not written
        return dq, dk, dv

    monkeypatch.setattr(launch, "run_backward", wrong)
    assert "dk is off" in str(selftest.disagreement(cpu, torch.float32, 32, dropout=True))
    monkeypatch.setattr(launch, "run_forward", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        assert "it failed" in str(selftest._disagreement("cpu", torch.float32, 32, False))
