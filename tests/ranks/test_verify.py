"""`megalite verify` says yes to what is right and no to each of these planted faults."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite import config as settings
from megalite import fit
from megalite.config import Config, load
from megalite.mesh import Mesh
from megalite.tune import parity
from megalite.tune.parity import assemble, on_mesh
from megalite.tune.shrink import MOST_RANKS, shrink
from megalite.tune.traffic import KINDS, expected, memory
from megalite.tune.verify import STEPS, compare

ZERO1 = {"zero_optimization": {"stage": 1}}
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def _small(recipe: str = "gpt2-124m", *, dropout: float = 0.0, **layout: Any) -> Config:
    """A shrunk recipe; `layout` is degrees of the mesh and settings of `train`."""
    mesh = {axis: layout.pop(axis, 1) for axis in ("dp", "pp", "cp", "tp")}
    train = {"precision": "fp32", "sequence_parallel": False, **layout}
    small, _ = shrink(load(recipe, overrides={"mesh": mesh, "train": train, "model": {"dropout": dropout}}))
    return small


# ---- planted faults, each run on every rank before it builds its engine ------------------------------------------------------------------


def scale_a_stages_gradients_twice() -> None:
    from megalite.parallel.zero import Zero

    backward = Zero.backward
    Zero.backward = lambda self, output, *received: backward(self, output * (2 if self.mesh.first_stage else 1), *received)  # type: ignore[method-assign]


def forget_to_sum_tied_copies() -> None:
    group = Mesh.group
    Mesh.group = lambda self, axis: group(self, "alone" if axis == "ends" else axis)  # type: ignore[method-assign]


def leave_a_stage_out_of_the_norm() -> None:
    from megalite.parallel import gradients

    whole = gradients.norm
    gradients.norm = lambda pieces, mesh, **beside: whole(pieces if mesh.first_stage else [], mesh, **beside)


def forget_to_reduce_what_a_column_cut_copied() -> None:
    from megalite.parallel import collectives

    collectives._Copy.backward = staticmethod(lambda ctx, *grads: (grads[0], None))  # type: ignore[method-assign]


def keep_the_gradients_of_the_step_before() -> None:
    from megalite.parallel import sums

    def begin(self: Any, num_microbatches: int) -> None:
        self.missing = [len(bucket.weights) * num_microbatches for bucket in self.buckets.every]

    sums.StepSums.begin = begin  # type: ignore[method-assign]
    sums.MicrobatchSums.begin = lambda self, num_microbatches: None  # type: ignore[method-assign]


def give_vocabulary_rows_to_the_wrong_rank() -> None:
    from megalite.parallel import tensor

    rows = tensor._rows
    tensor._rows = lambda size, mesh: rows(size, Mesh(dp=1, pp=1, tp=mesh.tp, rank=mesh.tp - 1 - mesh.tp_rank))


def read_the_samples_in_another_order() -> None:
    batch_of = parity.batch_of
    parity.batch_of = lambda config, step: batch_of(config, step ^ 1)


def drop_a_microbatch() -> None:
    from megalite.engine import Engine

    deal = Engine._deal

    def lose_one(self: Any, microbatches: list[dict[str, Tensor]], **others: Any) -> Iterator[dict[str, Tensor]]:
        batches = list(deal(self, microbatches, **others))
        batches[-1]["weights"] = torch.zeros_like(batches[-1]["weights"])
        return iter(batches)

    Engine._deal = lose_one  # type: ignore[method-assign]


def average_over_the_wrong_number_of_ranks() -> None:
    from megalite.parallel.buckets import FlatBuckets, ShardedBuckets

    for kind in (FlatBuckets, ShardedBuckets):

        def halve(self: Any, parts: list[Tensor], hand_over: Any = kind.hand_over) -> None:
            hand_over(self, [part.div_(2) for part in parts])

        kind.hand_over = halve  # type: ignore[method-assign]


def forget_to_reduce_norms_under_sequence_parallelism() -> None:
    from megalite.parallel import gradients

    complete = gradients.complete
    gradients.complete = lambda pieces, mesh, **how: complete(pieces, mesh, **{**how, "partial": False, "uneven": True})


def drop_the_same_on_ranks_with_other_parts() -> None:
    dropout: Any = importlib.import_module("megalite_kernels.dropout")  # and not the function of that name
    streams = dropout.streams
    dropout.streams = lambda samples, places, *, site: streams(samples, places - places.min(), site=site)


def take_the_keys_of_another_rank_for_ones_own() -> None:
    from megalite.parallel import context

    exchange = context.collectives.exchange

    def turned(x: Tensor, group: Any, *, split: int, join: int) -> Tensor:
        return exchange(x.roll(x.shape[split] // group.size(), dims=split) if split == 2 else x, group, split=split, join=join)

    context.collectives.exchange = turned


FAULTS: list[tuple[Callable[[], None], dict[str, int], dict]] = [
    (scale_a_stages_gradients_twice, {"pp": 2}, ZERO3),
    (forget_to_sum_tied_copies, {"pp": 2}, ZERO3),
    (leave_a_stage_out_of_the_norm, {"pp": 2, "dp": 2}, ZERO3),
    (forget_to_reduce_what_a_column_cut_copied, {"tp": 2}, ZERO3),
    (keep_the_gradients_of_the_step_before, {"dp": 2}, ZERO3),
    (keep_the_gradients_of_the_step_before, {"dp": 2}, ZERO1),
    (give_vocabulary_rows_to_the_wrong_rank, {"tp": 2}, ZERO3),
    (read_the_samples_in_another_order, {"dp": 2}, ZERO3),
    (drop_a_microbatch, {"dp": 2}, ZERO3),
    (average_over_the_wrong_number_of_ranks, {"dp": 2}, {}),
    (average_over_the_wrong_number_of_ranks, {"dp": 2}, ZERO1),
    (average_over_the_wrong_number_of_ranks, {"dp": 2}, ZERO3),
    (forget_to_reduce_norms_under_sequence_parallelism, {"tp": 2, "sequence_parallel": True}, ZERO3),
    (drop_the_same_on_ranks_with_other_parts, {"cp": 2, "dropout": 0.2}, ZERO3),
    (take_the_keys_of_another_rank_for_ones_own, {"cp": 2}, ZERO3),
]


@pytest.mark.parametrize(("fault", "mesh", "document"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_planted_fault_is_found(fault: Callable[[], None], mesh: dict[str, int], document: dict) -> None:
    # a vocabulary of odd size would crash where its rows are swapped; Llama's halves are equal
    small = _small("gpt-7b" if fault is give_vocabulary_rows_to_the_wrong_rank else "gpt2-124m", **mesh)
    try:
        findings = compare(small, assemble(on_mesh(small, document, steps=STEPS, plant=fault), steps=STEPS))
    except AssertionError as error:  # ranks that should hold copies hold different values: found, too
        assert "differ" in str(error) or "disagree" in str(error)
    else:
        assert not all(finding.good for finding in findings)


@pytest.mark.parametrize(("fault", "mesh", "document"), FAULTS[:2], ids=[fault.__name__ for fault, _, _ in FAULTS[:2]])
def test_without_the_fault_the_same_layout_is_right(fault: Callable[[], None], mesh: dict[str, int], document: dict) -> None:
    small = _small(**mesh)
    assert all(finding.good for finding in compare(small, assemble(on_mesh(small, document, steps=STEPS), steps=STEPS)))


# ---- traffic -----------------------------------------------------------------------------------------------------------------------------


SENT = [
    ("gpt2-124m", {"dp": 2, "pp": 2, "tp": 2}),
    ("gpt-7b", {"pp": 2, "tp": 2, "recompute": "full"}),
    ("bert-base", {"dp": 4}),
    ("bert-base", {"tp": 2, "recompute": "full"}),
    ("gpt2-124m", {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": True, "recompute": "full"}),
    ("bert-base", {"dp": 2, "tp": 2, "sequence_parallel": True, "recompute": "selective"}),
    ("gpt-7b", {"dp": 2, "cp": 2, "pp": 2, "recompute": "full"}),
    ("gpt-7b", {"cp": 2, "tp": 2, "sequence_parallel": True}),
    ("gpt2-124m", {"dp": 2, "pp": 2, "precision": "bf16"}),
    ("gpt2-124m", {"dp": 2, "tp": 2, "precision": "bf16", "reduce": "step"}),
]
QUICK = {0: 3, 1: 1, 3: 0, 5: 2, 6: 3, 7: 2, 8: 1, 9: 3}  # of each row of SENT, the ZeRO stage that is not slow


@pytest.mark.parametrize(
    ("recipe", "mesh", "stage"),
    [
        pytest.param(recipe, mesh, stage, marks=() if stage == QUICK.get(place) else (pytest.mark.slow,))
        for place, (recipe, mesh) in enumerate(SENT)
        for stage in range(4)
    ],
)
def test_bytes_sent_are_those_of_the_textbook(recipe: str, mesh: dict[str, int], stage: int) -> None:
    small = _small(recipe, **mesh)
    document = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    answers = on_mesh(small, document, steps=STEPS)
    for kind, (least, most) in expected(
        small, stage, [answer.parameters for answer in answers], [answer.whole for answer in answers]
    ).items():
        sent = sum(answer.sent[kind] for answer in answers)
        assert 0.95 * least <= sent <= 1.05 * most + 1024, f"{kind}: {sent} bytes, expected {least} to {most}"
    assert set(KINDS) >= set().union(*(answer.sent for answer in answers))


def test_weights_that_never_stay_are_gathered_as_often_as_the_textbook_allows() -> None:
    small = _small(dp=2)
    document = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}
    answers = on_mesh(small, document, steps=STEPS)
    _, most = expected(small, 3, [answer.parameters for answer in answers], [answer.whole for answer in answers])["all-gather"]
    # fp32, 2 microbatches, half to either rank: a head goes back right after it went forward, positions need nothing on their way back
    less = 2 * 4 * ((small.model.vocab or 0) + small.sequence) * small.model.width
    assert sum(answer.sent["all-gather"] for answer in answers) == most - less


@pytest.mark.parametrize("dp", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_rank_holds_its_share_under_zero_3(dp: int) -> None:
    """fp32: 4 bytes of weights, 4 of gradients, 12 of master weights and moments, for 1/dp of the parameters."""
    small = _small(dp=dp)
    document = {"zero_optimization": {**ZERO3["zero_optimization"], "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
    answers = on_mesh(small, document, steps=STEPS)
    share = 20 * answers[0].parameters / dp
    assert memory(small, 3, answers[0].parameters)[0] == share
    assert max(answer.held for answer in answers) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_holds_what_the_textbook_says_below_zero_3(stage: int, precision: str) -> None:
    small = _small(dp=2, precision=precision)
    answers = on_mesh(small, {"zero_optimization": {"stage": stage}} if stage else {}, steps=STEPS)
    least, most = memory(small, stage, answers[0].parameters)
    assert 0.95 * least <= max(answer.held for answer in answers) <= 1.05 * most


# ---- the verb ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", settings.recipes())
def test_a_shrunk_recipe_is_small_and_fits_its_mesh(recipe: str) -> None:
    run = load(recipe)
    small, changes = shrink(run)
    world = small.mesh.world
    assert world <= MOST_RANKS and changes
    fit.resolve_mesh(small, world)
    kept = ("family", "positions", "norm", "activation", "bias", "tied")
    assert all(getattr(small.model, name) == getattr(run.model, name) for name in kept)
    assert small.model.heads // small.model.num_kv_heads == min(4, run.model.heads // run.model.num_kv_heads)


def test_the_verb_prints_a_table_and_says_yes() -> None:
    """The README's command."""
    readme = Path(__file__).parents[2] / "README.md"
    (command,) = (line for line in readme.read_text().splitlines() if line.startswith("megalite verify "))
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=readme.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "gradient norm",
        "worst gradient",
        "worst weight",
        "in bf16: gradients",
        "reduce-scatter",
        "the same numbers as one process",
    ):
        assert words in done.stdout


def test_the_verb_says_no_and_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from megalite.tune import verify

    right = parity.on_mesh
    monkeypatch.setattr(verify, "on_mesh", lambda config, document, *, steps: right(config, document, steps=steps, plant=drop_a_microbatch))
    assert verify.verify(load("gpt-tiny", overrides={"mesh": {"dp": 2, "pp": 1, "tp": 1}})) == 1
    assert "DIFFERENT" in capsys.readouterr().out
