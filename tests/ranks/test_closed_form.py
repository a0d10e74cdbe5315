"""The closed form of memory beside the real engine on fake tensors, on a fake GPU."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from megalite import config as settings
from megalite.tune import choices, memory, runtime, search
from megalite.tune.dryrun import trace
from megalite.tune.layouts import Layouts, enumerate_layouts
from megalite.tune.shape import Shape
from megalite.tune.splits import split

SMALL = {"model": {"layers": 4, "width": 512, "heads": 8, "vocab": 5000, "sequence": 512}, "train": {"global_batch": 64}}
BUCKET = 1_100_000  # above the largest matrix of a block, as in life


@pytest.fixture(scope="module")
def off() -> Iterator[Callable[[str, Layouts], float]]:
    """`_off` in an interpreter of its own: a process that has run a backward pass, and its forks, know no new device."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        yield lambda recipe, layout: fresh.submit(_off, recipe, layout).result()


def _off(recipe: str, layout: Layouts) -> float:
    """Predicted over traced peak of the rank that is predicted to be the fullest, less 1."""
    model = {**SMALL["model"], **({"mlp": 1376} if recipe == "gpt-7b" else {})}
    config = settings.load(recipe, overrides={**SMALL, "model": model})
    row = {**layout.row(0), "bucket": BUCKET, "live": BUCKET}
    layout = Layouts.of(**row)
    ours = search.for_precision(runtime.find("megalite"), config)
    ours = dataclasses.replace(ours, memory=dataclasses.replace(ours.memory, context=0.0))  # fake tensors know no CUDA
    ranks = split(Shape.of(config), layout, ours.rule)
    account = memory.waterfall(Shape.of(config), layout, ranks, ours)
    placed = choices.as_config(config, row)
    rank = int(ranks.place[0, int(account["rank"][0])]) * placed.mesh.cp * placed.mesh.tp
    document = choices.document(row, config)
    if row["stage"] == 3:
        document["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    seen = trace(placed, document, rank=rank, owners=False)
    return float(memory.peak(account)[0]) / max(seen.peak["fakegpu"], seen.start_up["fakegpu"]) - 1


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        pytest.param("gpt-1.3b", "dp4 tp2 zero2 micro2 sp", marks=pytest.mark.slow),
        pytest.param("gpt-1.3b", "dp8 zero2 micro4 selective", marks=pytest.mark.slow),
        pytest.param("gpt-7b", "dp4 pp2 zero1 micro4", marks=pytest.mark.slow),
        ("gpt-1.3b", "dp8 zero3 micro4"),
        *(
            pytest.param("gpt-1.3b", words, marks=pytest.mark.slow)
            for words in ("dp4 cp2 zero2 micro8", "dp4 cp2 zero3 micro8 selective", "dp4 pp2 zero2 micro8 interleaved2")
        ),
    ],
)
def test_the_closed_form_is_within_half_a_percent_of_the_engine(recipe: str, words: str, off: Callable[[str, Layouts], float]) -> None:
    assert abs(off(recipe, choices.read(words, batch=64, world=8))) < 0.005


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_closed_form_is_near_the_engine_on_layouts_drawn_at_random(off: Callable[[str, Layouts], float]) -> None:
    draw = random.Random(11)
    config = settings.load("gpt-1.3b", overrides=SMALL)
    found = enumerate_layouts(config, 8)
    away = sorted(abs(off("gpt-1.3b", found.take([row]))) for row in draw.sample(range(len(found)), 40))
    assert away[len(away) // 2] < 0.01, away
