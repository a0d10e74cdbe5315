"""Schedules: who computes, sends and receives what when, how long that takes, and what the tuner says of it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.parallel.pipeline import SCHEDULES, exchanged
from megalite.tune import splits, turns

SENDS = {"SEND_F": ("RECV_F", 1), "SEND_B": ("RECV_B", -1)}
NEEDS = {"FORWARD": ("RECV_F", -1), "FULL_BACKWARD": ("RECV_B", 1), "BACKWARD_INPUT": ("RECV_B", 1), "BACKWARD_WEIGHT": ("", 0)}


def _computations(v: int, pp: int, num: int, kind: str) -> dict[int, list[Any]]:
    """torch's own, of every rank; nothing where a rank waits."""
    of_a_schedule = {"n_local_stages": v, "_stages": range(v), "pp_group_size": pp, "_n_microbatches": num}
    schedule = SimpleNamespace(**of_a_schedule, microbatches_per_round=num // max(1, num // pp))
    # a schedule itself needs stages and ranks; its order needs these numbers
    return {rank: SCHEDULES[kind]._calculate_single_rank_operations(schedule, rank) for rank in range(pp)}


def _said(action: Any) -> tuple[str, int, int | None]:
    return action.computation_type.name, action.stage_index, action.microbatch_index


def _draw(draw: random.Random, kind: str) -> tuple[int, int, int]:
    """Chunks, ranks, microbatches."""
    while True:
        pp, v = draw.choice((2, 3, 4, 8)), draw.choice((1, 2, 3) if kind == "zerobubble" else (2, 3, 4))
        rounds = draw.randrange(1, 7)
        num = rounds * draw.randrange(pp, 2 * pp) if rounds > 1 else draw.randrange(1, 2 * pp)
        if kind == "looped" or num % max(1, num // pp) == 0:
            return v, pp, num


@pytest.mark.parametrize("kind", ["interleaved", "looped", "zerobubble"])
def test_transfers_can_be_made_one_after_the_other(kind: str) -> None:
    """By ranks that wait at every transfer for the other side: none waits forever, all is received once, and before it is used."""
    draw = random.Random(5)
    for _ in range(40):
        v, pp, num = _draw(draw, kind)
        computations = _computations(v, pp, num, kind)
        left = {rank: [_said(action) for action in actions] for rank, actions in exchanged(computations, v * pp).items()}
        for rank, actions in computations.items():
            assert [each for each in left[rank] if each[0] in NEEDS] == [_said(action) for action in actions if action]
        came: set[tuple[str, int, int | None]] = set()
        while any(left.values()):
            before = sum(map(len, left.values()))
            for actions in left.values():
                while actions and actions[0][0] in NEEDS:
                    what, stage, microbatch = actions.pop(0)
                    needed, step = NEEDS[what]
                    assert not needed or not 0 <= stage + step < v * pp or (needed, stage, microbatch) in came
                if actions and actions[0][0] in SENDS:
                    what, stage, microbatch = actions[0]
                    received = (SENDS[what][0], stage + SENDS[what][1], microbatch)
                    other = left[received[1] % pp]
                    if other and other[0] == received:
                        assert other is not actions and received not in came
                        came.add(received)
                        del actions[0], other[0]
            assert sum(map(len, left.values())) < before, (v, pp, num, left)
        assert len(came) == 2 * num * (v * pp - 1)


def _seconds(v: int, pp: int, num: int, kind: str, cost: dict[str, int]) -> int:
    """How long a step takes, where transfers take no time, but each rank makes its own one after the other, as NCCL does."""
    left = {rank: [_said(each) for each in actions] for rank, actions in exchanged(_computations(v, pp, num, kind), v * pp).items()}
    clock, busy, line = dict.fromkeys(left, 0), dict.fromkeys(left, 0), {rank: [] for rank in left}  # computations; transfers, to be made
    came: dict[tuple[str, int, int | None], int] = {}
    while any(left.values()):
        for rank, actions in left.items():
            while actions:
                what, stage, microbatch = actions[0]
                if what not in cost:
                    line[rank].append((what, stage, microbatch, clock[rank]))
                else:
                    needed, step = NEEDS[what]
                    if needed and 0 <= stage + step < v * pp:
                        if (needed, stage, microbatch) not in came:
                            break
                        clock[rank] = max(clock[rank], came[needed, stage, microbatch])
                    clock[rank] += cost[what]
                del actions[0]
        for rank, waiting in line.items():
            while waiting and waiting[0][0] in SENDS:
                what, stage, microbatch, _ = waiting[0]
                received = (SENDS[what][0], stage + SENDS[what][1], microbatch)
                target = received[1] % pp
                if not line[target] or line[target][0][:3] != received:
                    break
                came[received] = max(waiting.pop(0)[3], line[target].pop(0)[3], busy[rank], busy[target])
                busy[rank] = busy[target] = came[received]
    return max(clock.values())


@pytest.mark.parametrize("again", [0, 1])
@pytest.mark.parametrize(("v", "pp", "num"), [(1, 4, 8), (1, 4, 16), (1, 8, 16), (2, 4, 8), (3, 4, 12)])
def test_a_bubble_is_filled_with_gradients_of_weights(v: int, pp: int, num: int, again: int) -> None:
    """(p - 1) (F + B + W) / v of them without, (p - 1) (F + B - W) / v with (Qi et al. 2023, arXiv:2401.10241, table 2), where forward,
    the gradients of activations, with `again` a forward pass before, and those of weights take equally long.
    """
    cost = {"FORWARD": 1, "FULL_BACKWARD": 2 + again, "BACKWARD_INPUT": 1 + again, "BACKWARD_WEIGHT": 1}
    busy = num * v * (3 + again)
    found = {kind: _seconds(v, pp, num, kind, cost) - busy for kind in ("interleaved", "zerobubble")}
    assert found == {"interleaved": (pp - 1) * (3 + again), "zerobubble": (pp - 1) * (1 + again)}


def _walk(sizes: tuple[int, ...], *, place: int, pp: int, num: int, schedule: str) -> list[tuple[float, ...]]:
    """What a rank with chunks of so many blocks holds: blocks, chunks with what was received, and whether blocks have been back, when it is
    the most that goes back through the last chunk, through any with blocks, through one with the most, and through the first.
    """
    blocks, chunks, summed, most, received = 0, 0, False, [(0, 0, False)] * 4, 0
    for action in exchanged(_computations(len(sizes), pp, num, schedule), len(sizes) * pp)[place]:
        chunk, kind = action.stage_index // pp, action.computation_type.name
        if kind.startswith("RECV"):
            received += 1
        elif kind == "FORWARD":
            blocks, chunks, received = blocks + sizes[chunk], chunks + 1, received - (action.stage_index > 0)
        elif kind == "FULL_BACKWARD":
            for number, there in enumerate((chunk == len(sizes) - 1, sizes[chunk] > 0, sizes[chunk] == max(sizes), chunk == 0)):
                most[number] = max(most[number], (blocks, chunks + received, summed)) if there else most[number]
            blocks, chunks, summed = blocks - sizes[chunk], chunks - 1, summed or sizes[chunk] > 0
            received -= action.stage_index < len(sizes) * pp - 1
    return [(float(blocks), float(chunks), float(summed)) for blocks, chunks, summed in most]


@pytest.mark.parametrize("looped", [False, True])
def test_what_is_in_flight_is_what_the_schedule_holds(looped: bool) -> None:
    draw = random.Random(4)
    for _ in range(120):
        v, pp, num = _draw(draw, "looped" if looped else "interleaved")
        rounds = max(1, num // pp)
        sizes, place = (*(draw.randrange(0, 4) for _ in range(v - 1)), draw.randrange(0, 2)), draw.randrange(pp)
        group, followed = (num, 0) if looped else (num // rounds, min(rounds, splits.ROUNDS))
        ends = place == 0, place == pp - 1
        states = turns.whole(sizes, *ends, pp, place, (group, followed), full=False, streams=False)
        turn, deep, wide, end = states
        walked = _walk(sizes, place=place, pp=pp, num=num, schedule="looped" if looped else "interleaved")
        alone = place == pp - 1 and not sizes[-1]  # a head
        pairs = [(turn, walked[0]), (wide, walked[2]), (end, walked[0 if alone else 3]), *([(deep, walked[1])] if any(sizes) else [])]
        for state, (blocks, held, summed) in pairs:
            found = turns.Alive(*state)
            assert (found.blocks, found.units + found.waiting) == (blocks, held)
            # a rank with fewer microbatches than ranks may wait behind the first backward, where it is said to be as full again
            assert found.summed == summed or (found.summed > summed and num < pp and not looped)


def test_what_waits_for_its_second_half_is_what_the_schedule_holds() -> None:
    """Blocks with activations, blocks whose weights wait, chunks and what was received, where a first half finds most, and a second."""
    draw = random.Random(6)
    for _ in range(120):
        v, pp, num = _draw(draw, "zerobubble")
        rounds, place = max(1, num // pp), draw.randrange(pp)
        sizes = tuple(draw.randrange(1, 4) for _ in range(v))
        blocks, late, chunks, received, most = 0, 0, 0, 0, {}
        for action in exchanged(_computations(v, pp, num, "zerobubble"), v * pp)[place]:
            size, kind = sizes[action.stage_index // pp], action.computation_type.name
            if kind.startswith("RECV"):
                received += 1
            elif kind == "FORWARD":
                blocks, chunks, received = blocks + size, chunks + 1, received - (action.stage_index > 0)
            elif kind.startswith("BACKWARD"):
                most[kind] = max(most.get(kind, (0, 0, 0)), (blocks + late, chunks, received))
                if kind == "BACKWARD_INPUT":
                    blocks, late, chunks, received = blocks - size, late + size, chunks - 1, received - (action.stage_index < v * pp - 1)
                else:
                    late -= size
        ends = place == 0, place == pp - 1
        states = turns.halved(sizes, *ends, pp, place, (num // rounds, min(rounds, splits.ROUNDS)), recompute=0)
        first, second = turns.Halved(*states[1]), turns.Halved(*states[4])
        for found, seen in ((first, most["BACKWARD_INPUT"]), (second, most["BACKWARD_WEIGHT"])):
            assert (found.blocks + found.late, found.units) == seen[:2], (v, pp, num, place)
        if num % pp == 0:  # else ranks come to wait for each other
            assert first.waiting == most["BACKWARD_INPUT"][2], (v, pp, num, place)
            assert abs(second.waiting - most["BACKWARD_WEIGHT"][2]) <= 1, (v, pp, num, place)
