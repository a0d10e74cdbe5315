"""ZeRO-3's weights: what stays, what comes and goes, and what is fetched ahead. That the numbers are right, tests/parity says."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from megalite import launch
from megalite.config import Config
from megalite.parallel.gather import Limits, choose

LAYERS = 6
WEIGHTS = {"model": {"layers": LAYERS, "width": 32, "heads": 2, "vocab": 50, "sequence": 16}}


@dataclass
class Seen:
    """Of one rank, over several steps."""

    sizes: dict[str, int] = field(default_factory=dict)  # elements by weight
    most: int = 0  # elements gathered at once
    gathers: list[Counter[str]] = field(default_factory=list)  # by step
    late: list[int] = field(default_factory=list)  # modules whose weights were not even on their way when they were needed, by step
    ways: list[int] = field(default_factory=list)  # modules passed, by step
    losses: list[float] = field(default_factory=list)
    held: int = 0  # weights that come and go, and have not gone when a step or a validation ends
    left: int = 0  # elements gathered between steps


def _watch(rank: int, *, live: int, ahead: int, steps: int, forwards: bool, astray: int | None, **train: Any) -> Seen:
    """So many steps; where there are `forwards` a validation after each, and before step `astray` a remembered way that is not the way."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from megalite.parallel.gather import Gathering
    from megalite.tune.parity import batch_of, microbatches, start_engine

    config = Config.model_validate(
        {**WEIGHTS, "mesh": {"dp": 2, "pp": 2}, "train": {"global_batch": 8, "micro_batch": 1, "precision": "fp32", **train}}
    )
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": live, "stage3_max_reuse_distance": 10**9}
    engine = start_engine(config, {"zero_optimization": {**zero, "stage3_prefetch_bucket_size": ahead}})
    weights: dict[str, Any] = dict(engine.zero.engine.module.named_parameters())
    names, seen = {id(weight): name for name, weight in weights.items()}, Seen({name: w.ds_numel for name, w in weights.items()})
    start, fetch, end_step = Gathering._start, Gathering._fetch, Gathering.end_step

    def there() -> int:
        return sum(weight.ds_numel for weight in weights.values() if weight.ds_status is not ZeroParamStatus.NOT_AVAILABLE)

    def count(self: Gathering, weight: Any) -> None:
        seen.gathers[-1][names[id(weight)]] += weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
        start(self, weight)

    def look(self: Gathering, module: Any) -> None:
        seen.late[-1] += any(weight.ds_status is ZeroParamStatus.NOT_AVAILABLE for weight in self.of[module])
        fetch(self, module)
        seen.most = max(seen.most, there())

    def end(self: Gathering) -> None:
        seen.held = max(seen.held, len(self.uses))
        end_step(self)

    Gathering._start, Gathering._fetch, Gathering.end_step = count, look, end
    gathering = engine.zero.gathering
    assert gathering is not None
    for step in range(steps):
        mine = microbatches(batch_of(config, step), config, dp=2, dp_rank=engine.mesh.dp_rank)
        if step == astray:
            gathering.way.append(gathering.way.pop(0))
        seen.gathers.append(Counter())
        seen.late.append(0)
        seen.losses.append(engine.step(step, mine).loss)
        seen.ways.append(len(gathering.way))
        seen.left = max(seen.left, there())
        if forwards:
            seen.gathers.append(Counter())
            seen.late.append(0)
            engine.validate(mine)
            seen.left = max(seen.left, there())
    return seen


def _watched(*, live: int, ahead: int, steps: int = 3, forwards: bool = False, astray: int | None = None, **train: Any) -> list[Seen]:
    work = functools.partial(_watch, live=live, ahead=ahead, steps=steps, forwards=forwards, astray=astray, **train)
    return launch.run_ranks(4, work, warm=("megalite.engine",))


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("gpipe", marks=pytest.mark.long)])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_what_stays_is_gathered_once_a_step_and_the_rest_stays_below_the_limit(schedule: str, recompute: str) -> None:
    live, ahead = 30_000, 8_000
    for seen in _watched(live=live, ahead=ahead, schedule=schedule, recompute=recompute):
        sizes = list(seen.sizes.values())
        stay, _ = choose(sizes, Limits(live, ahead))
        staying = list(seen.sizes)[len(sizes) - stay :]
        assert 3 < stay < len(sizes) - 3
        last = seen.gathers[-1]
        assert all(last[name] == 1 for name in staying)
        assert all(last[name] > 1 for name in seen.sizes if name not in staying)
        assert sum(seen.sizes[name] for name in staying) < seen.most <= live
        assert seen.held == 0 and seen.left == 0, "the optimizer renews them"


def test_where_all_fit_all_stay() -> None:
    for seen in _watched(live=10**9, ahead=10**9):
        assert seen.most == sum(seen.sizes.values())
        assert all(gathers == dict.fromkeys(seen.sizes, 1) for gathers in seen.gathers)


def test_a_limit_below_the_largest_leaves_room_for_what_is_at_work() -> None:
    for seen in _watched(live=1, ahead=10**9):
        modules = Counter({name.rpartition(".")[0]: 0 for name in seen.sizes})
        for name, size in seen.sizes.items():
            modules[name.rpartition(".")[0]] += size
        assert seen.most == max(modules.values())


@pytest.mark.parametrize(("live", "ahead"), [(1, 8_000), (30_000, 8_000), (10**9, 20_000)])
def test_from_the_second_step_on_weights_are_on_their_way_before_they_are_needed(live: int, ahead: int) -> None:
    for seen in _watched(live=live, ahead=ahead):
        first, *later = seen.late
        assert first
        for late in later:
            # the first on the way, of the embedding; with no room ahead, all
            assert late > LAYERS if live == 1 else late == 1


def test_a_way_that_was_remembered_wrong_is_written_anew() -> None:
    right_and_wrong = (_watched(live=30_000, ahead=8_000, steps=5, astray=step) for step in (None, 2))
    for right, wrong in zip(*right_and_wrong, strict=True):
        assert wrong.losses == right.losses
        assert wrong.ways == right.ways
        assert wrong.most <= 30_000 and wrong.left == 0
        assert wrong.late[2] > 1 and wrong.late[3:] == right.late[3:]
        assert wrong.gathers[4] == right.gathers[4]


def test_a_validation_has_a_way_of_its_own() -> None:
    for seen in _watched(live=30_000, ahead=8_000, forwards=True):
        assert seen.most <= 30_000 and seen.left == 0
        (_, *steps), (first, *validations) = seen.late[::2], seen.late[1::2]
        assert steps == validations == [1, 1]
        assert first > LAYERS


# ---- what is chosen --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "live", "ahead", "stay", "left"),
    [
        ([5, 1, 2], 8, 100, 3, 100),  # all
        ([5, 1, 2], 7, 0, 1, 0),  # 2, and the 5 when it is needed
        ([5, 1, 2], 7, 1, 0, 1),  # 2 + 5 + 1 are too many
        ([1, 2, 5], 7, 0, 1, 0),  # 5, and the 2
        ([1, 2, 5], 6, 0, 0, 0),
        ([1, 2, 5], 4, 3, 0, 0),
        ([2, 2, 2, 2], 7, 1, 2, 1),
        ([2, 2, 2, 2], 7, 9, 0, 5),
    ],
)
def test_the_last_weights_stay_that_leave_room_for_the_others(sizes: list[int], live: int, ahead: int, stay: int, left: int) -> None:
    assert choose(sizes, Limits(live, ahead)) == (stay, left)
