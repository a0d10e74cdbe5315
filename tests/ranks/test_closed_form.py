"""The closed form of memory beside the real engine on fake tensors, on a fake GPU."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import numpy as np
import pytest

from megalite import config as settings
from megalite.tune import choices, memory, runtime, search
from megalite.tune.dryrun import trace
from megalite.tune.layouts import ZERO_BUBBLE, Layouts, enumerate_layouts
from megalite.tune.shape import Shape
from megalite.tune.splits import split

SMALL = {"model": {"layers": 4, "width": 512, "heads": 8, "vocab": 5000, "sequence": 512}, "train": {"global_batch": 64}}
BUCKET = 1_100_000  # above the largest matrix of a block, as in life
SHALLOW = {"model": {"layers": 8, "vocab": 50304}, "train": {"global_batch": 64}}  # blocks, buckets and limits of real size


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """Interpreters of their own: a process that has run a backward pass, and its forks, know no new device."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as fresh:
        yield fresh


def _off(recipe: str, layout: Layouts) -> float:
    """On a small model, with buckets and limits to match."""
    model = {**SMALL["model"], **({"mlp": 1376} if recipe == "gpt-7b" else {})}
    config = settings.load(recipe, overrides={**SMALL, "model": model})
    return _compared(config, Layouts.of(**{**layout.row(0), "bucket": BUCKET, "live": BUCKET}))


def _off_shallow(recipe: str, layout: Layouts) -> float:
    return _compared(settings.load(recipe, overrides=SHALLOW), layout)


def _compared(config: settings.Config, layout: Layouts) -> float:
    """Predicted over traced peak of the rank that is predicted to be the fullest, less 1."""
    ours = search.for_precision(runtime.find("megalite"), config)
    ours = dataclasses.replace(ours, memory=dataclasses.replace(ours.memory, context=0.0))  # fake tensors know no CUDA
    ranks = split(Shape.of(config), layout, ours.rule)
    account = memory.waterfall(Shape.of(config), layout, ranks, ours)
    row = layout.row(0)
    placed = choices.as_config(config, row)
    place, mesh = int(ranks.place[int(account["rank"][0]), 0]), placed.mesh
    document = choices.document(row, config)
    if row["stage"] == 3:
        document["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    seen = trace(placed, document, rank=place * mesh.cp * mesh.tp, owners=False)
    return float(memory.peak(account)[0]) / max(seen.peak["fakegpu"], seen.start_up["fakegpu"]) - 1


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        pytest.param("gpt-1.3b", "dp4 tp2 zero2 micro2 sp", marks=pytest.mark.slow),
        pytest.param("gpt-1.3b", "dp8 zero2 micro4 selective", marks=pytest.mark.slow),
        pytest.param("gpt-7b", "dp4 pp2 zero1 micro4", marks=pytest.mark.slow),
        pytest.param("gpt-1.3b", "dp8 zero3 micro4", marks=pytest.mark.long),
        ("gpt-7b", "dp4 pp2 zero2 micro4 gpipe full offload"),
        *(
            pytest.param("gpt-1.3b", words, marks=pytest.mark.slow)
            for words in ("dp4 cp2 zero2 micro8", "dp4 cp2 zero3 micro8 selective", "dp4 pp2 zero2 micro8 interleaved2")
        ),
    ],
)
def test_the_closed_form_is_within_half_a_percent_of_the_engine(recipe: str, words: str, elsewhere: Executor) -> None:
    assert abs(elsewhere.submit(_off, recipe, choices.read(words, batch=64, world=8)).result()) < 0.005


@pytest.mark.parametrize(
    ("words", "bucket", "live"),
    [
        ("dp1 tp8 pp2 zero3 micro16 1f1b selective sp offload-parameters", 200, 500),  # what is summed over ranks is not kept
        pytest.param("dp16 zero1 micro2", 50, 500, marks=pytest.mark.long),  # whole sums, there all the time
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("dp16 zero3 micro2 step", 50, 100),  # whole sums beside weights that come and go
                ("dp4 pp4 zero3 micro2 1f1b full offload", 200, 2000),  # the second block, when the first bucket is there
                ("dp2 tp2 pp2 cp2 zero3 micro8 gpipe full sp offload-parameters", 200, 500),  # and a head still on its way
                ("dp2 tp4 pp2 zero3 micro4 interleaved4", 200, 2000),  # a chunk with more blocks than others
                ("dp4 tp4 zero3 micro2 full", 200, 100),  # a weight that goes behind its product
                ("dp1 tp2 pp2 cp4 zero3 micro8 looped3 selective offload", 200, 100),  # and one that is soon needed again
                ("dp1 tp8 pp2 zero0 micro16 interleaved4 selective", 50, 500),  # a block on its way forward
                ("dp2 tp2 pp2 cp2 zero3 micro8 interleaved2 full offload", 50, 100),  # a chunk that goes forward next is fetched ahead
                ("dp2 tp2 pp2 cp2 zero2 micro4 looped3 full offload", 50, 100),  # a head alone in its chunk
                ("dp2 cp8 zero2 micro32 full offload", 50, 500),  # one microbatch
            )
        ),
    ],
)
def test_the_closed_form_follows_layouts_that_once_were_off(words: str, bucket: int, live: int, elsewhere: Executor) -> None:
    limits = {"bucket": bucket * 1_000_000, "live": live * 1_000_000}
    layout = Layouts.of(**{**choices.read(words, batch=64, world=16).row(0), **limits})
    assert abs(elsewhere.submit(_off_shallow, "gpt-1.3b", layout).result()) < 0.001


@pytest.mark.parametrize(
    ("words", "bucket", "live"),
    [
        ("dp4 tp2 pp2 zero3 micro16 zerobubble selective", 50, 100),  # a weight that goes before its product's other half
        *(
            pytest.param(*case, marks=mark)
            for mark, *case in (
                (pytest.mark.long, "dp2 pp8 zero3 micro8 zerobubble full", 50, 500),  # fewer microbatches than ranks
                (pytest.mark.slow, "dp2 tp2 pp2 cp2 zero3 micro32 zerobubble sp offload", 200, 500),  # the exchange of attention
                (
                    pytest.mark.slow,
                    "dp2 pp2 cp4 zero3 micro4 zerobubble selective offload-parameters",
                    50,
                    500,
                ),  # one for the host
                (pytest.mark.slow, "dp4 pp4 zero3 micro2 zerobubble selective", 200, 2000),  # a bucket, beside what was sent on
                (pytest.mark.slow, "dp8 pp2 zero3 micro1 zerobubble3 full offload", 50, 500),  # an embedding larger than what is kept
            )
        ),
    ],
)
def test_the_closed_form_follows_passes_that_are_halved(words: str, bucket: int, live: int, elsewhere: Executor) -> None:
    limits = {"bucket": bucket * 1_000_000, "live": live * 1_000_000}
    layout = Layouts.of(**{**choices.read(words, batch=64, world=16).row(0), **limits})
    assert abs(elsewhere.submit(_off_shallow, "gpt-1.3b", layout).result()) < 0.001


@pytest.mark.parametrize(
    ("words", "bucket", "live"),
    [
        ("dp2 tp4 pp2 zero3 micro16 1f1b full offload", 200, 500),  # a norm at a block's end, and at the embedding's
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("dp2 tp8 zero3 micro16 full offload", 200, 500),  # what the pairs need, beside the tables of the embedding
                ("dp2 tp2 pp2 cp2 zero3 micro4 looped2 selective", 50, 500),  # and alone, at the turn
                ("dp2 pp2 cp4 zero2 micro32 gpipe selective offload", 50, 500),  # results that are kept until they are added up
            )
        ),
    ],
)
def test_the_closed_form_knows_what_bert_has_more(words: str, bucket: int, live: int, elsewhere: Executor) -> None:
    limits = {"bucket": bucket * 1_000_000, "live": live * 1_000_000}
    layout = Layouts.of(**{**choices.read(words, batch=64, world=16).row(0), **limits})
    assert abs(elsewhere.submit(_off_shallow, "bert-large", layout).result()) < 0.001


def _off_dropping(layout: Layouts) -> float:
    dropping = {**SHALLOW, "model": {**SHALLOW["model"], "dropout": 0.1, "attention_dropout": 0.1}}
    return _compared(settings.load("gpt-1.3b", overrides=dropping), layout)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["dp2 tp4 cp2 zero3 micro8 sp offload", "dp2 tp4 pp2 zero1 micro16 looped2 full sp"])
def test_the_closed_form_counts_what_dropout_keeps(words: str, elsewhere: Executor) -> None:
    layout = Layouts.of(**{**choices.read(words, batch=64, world=16).row(0), "bucket": 200_000_000})
    assert abs(elsewhere.submit(_off_dropping, layout).result()) < 0.001


def _off_in_pieces(layout: Layouts) -> float:
    """Nor do logits hide what else is there."""
    pieces = {**SHALLOW, "train": {**SHALLOW["train"], "loss_pieces": 16}, "data": {"document_mask": True}}
    return _compared(settings.load("gpt-1.3b", overrides=pieces), layout)


@pytest.mark.parametrize(
    ("words", "live"),
    [
        ("dp1 tp2 cp8 zero3 micro32 sp offload", 2000),  # at the turn
        *(
            pytest.param(words, 500, marks=pytest.mark.slow)
            for words in ("dp4 pp2 cp2 zero2 micro16 gpipe full offload", "dp4 tp4 zero1 micro2", "dp8 pp2 zero3 micro4 zerobubble")
        ),
    ],
)
def test_the_closed_form_knows_a_loss_in_pieces_and_documents(words: str, live: int, elsewhere: Executor) -> None:
    limits = {"bucket": 200_000_000, "live": live * 1_000_000}
    layout = Layouts.of(**{**choices.read(words, batch=64, world=16).row(0), **limits})
    assert abs(elsewhere.submit(_off_in_pieces, layout).result()) < 0.001


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("recipe", "halved", "num", "most"), [("gpt-1.3b", False, 200, 195), ("gpt-1.3b", True, 40, 38), ("bert-large", False, 40, 37)]
)
def test_the_closed_form_is_near_the_engine_on_layouts_drawn_at_random(
    recipe: str, halved: bool, num: int, most: int, elsewhere: Executor
) -> None:
    """halved: zero-bubble schedules alone, or all others."""
    draw, config = random.Random(17), settings.load(recipe, overrides=SHALLOW)
    found = enumerate_layouts(config, 16)
    found = found.take((found.schedule == ZERO_BUBBLE) == halved)
    few = np.flatnonzero(found.microbatches <= 8).tolist()  # more take longer and are no fuller
    drawn = [elsewhere.submit(_off_shallow, recipe, found.take([row])) for row in draw.sample(few, num)]
    away = sorted(abs(each.result()) for each in drawn)
    assert away[num // 2] < 0.0005 and away[most] < 0.005 and away[-1] < 0.01, away
