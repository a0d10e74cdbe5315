"""Learning rates against their closed forms, which parameters decay, and how they are grouped."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite import models, optim
from megalite.config import Model, Optimizer

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@st.composite
def runs(draw: st.DrawFn) -> tuple[Optimizer, int]:
    steps = draw(st.integers(1, 500))
    optimizer = Optimizer(
        lr=draw(st.floats(1e-6, 1.0)),
        schedule=draw(st.sampled_from(SCHEDULES)),
        warmup=draw(st.integers(0, 600)),
        min_lr=draw(st.floats(0, 1)),
        decay_fraction=draw(st.floats(0.01, 1)),
    )
    return optimizer, steps


def rates(optimizer: Optimizer, steps: int) -> list[float]:
    return [optim.learning_rate(step, optimizer, steps) for step in range(steps)]


def test_warm_up_climbs_in_equal_steps_from_the_first_step_to_the_peak() -> None:
    optimizer = Optimizer(lr=0.8, warmup=4, schedule="cosine")
    assert rates(optimizer, 100)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    for schedule in SCHEDULES:
        assert optim.learning_rate(0, Optimizer(lr=0.3, warmup=0, schedule=schedule), 10) == pytest.approx(0.3)


def test_cosine_is_half_way_between_peak_and_end_in_the_middle() -> None:
    optimizer = Optimizer(lr=2.0, warmup=10, min_lr=0.1, schedule="cosine")
    assert optim.learning_rate(60, optimizer, 110) == pytest.approx((2.0 + 0.2) / 2)
    assert optim.learning_rate(35, optimizer, 110) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_linear_falls_by_the_same_amount_every_step() -> None:
    found = rates(Optimizer(lr=1.0, warmup=5, min_lr=0.5, schedule="linear"), 25)[5:]
    assert [a - b for a, b in pairwise(found)] == pytest.approx([0.5 / 20] * 19)
    assert found[0] == 1.0 and found[-1] == pytest.approx(0.5 + 0.5 / 20)


def test_wsd_is_flat_and_then_falls_over_the_last_fifth() -> None:
    found = rates(Optimizer(lr=1.0, warmup=10, min_lr=0.0, schedule="wsd", decay_fraction=0.2), 100)
    assert found[9:81] == [1.0] * 72
    assert found[81:] == pytest.approx([1 - n / 20 for n in range(1, 20)])


def test_the_end_lies_one_after_the_last_step_and_stays() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        optimizer = Optimizer(lr=2.0, warmup=3, min_lr=0.25, schedule=schedule)
        assert optim.learning_rate(40, optimizer, 40) == pytest.approx(0.5)
        assert optim.learning_rate(400, optimizer, 40) == pytest.approx(0.5)


@given(runs())
def test_every_step_learns_and_none_is_above_the_peak(run: tuple[Optimizer, int]) -> None:
    optimizer, steps = run
    assert all(0 < rate <= optimizer.lr * (1 + 1e-12) for rate in rates(optimizer, steps))


@given(runs())
def test_the_rate_only_climbs_during_warm_up_and_only_falls_after_it(run: tuple[Optimizer, int]) -> None:
    optimizer, steps = run
    found = rates(optimizer, steps)
    up, down = found[: optimizer.warmup], found[optimizer.warmup :]
    assert up == sorted(up)
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(down))


@given(runs())
def test_after_warm_up_no_rate_is_below_its_end(run: tuple[Optimizer, int]) -> None:
    optimizer, steps = run
    assert all(rate >= optimizer.lr * optimizer.min_lr * (1 - 1e-12) for rate in rates(optimizer, steps)[optimizer.warmup :])


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not(family: str) -> None:
    model = Model(family=family, layers=1, width=32, heads=4, vocab=50, sequence=8)
    shapes = {name: tuple(p.shape) for name, p in models.build(model, seed=1, device="meta").named_parameters()}
    for name, shape in shapes.items():
        assert optim.decays(name, shape) == (name.endswith(".weight") and "norm" not in name), name
    assert optim.decays("embed.token.weight", shapes["embed.token.weight"])
    assert not optim.decays("layers.0.attention_norm.weight", shapes["layers.0.attention_norm.weight"])


def test_runs_hold_as_many_layers_as_fit_and_of_a_larger_one_every_weight_alone() -> None:
    layers = [[torch.empty(size) for size in layer] for layer in ((2, 1), (5,), (1, 4), (9,), (1, 8, 1), (7, 1))]
    runs = [[weight.numel() for weight in run] for run in optim.runs(layers, 8, size=torch.Tensor.numel)]
    assert runs == [[2, 1, 5], [1, 4], [9], [1], [8], [1], [7, 1]]
    assert optim.runs(layers, 40, size=torch.Tensor.numel) == [[weight for layer in layers for weight in layer]]
    assert optim.runs([], 8, size=torch.Tensor.numel) == []
