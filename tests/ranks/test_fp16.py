"""fp16 on a mesh: one loss scale, one decision to skip a step, and numbers as good as those of one fp16 rank."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite import launch
from megalite.config import Config
from megalite.errors import UserError
from megalite.parallel.gradients import LossScale
from megalite.tune import parity
from megalite.tune.verify import compare_rounded

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from compare import config_of

MESHES = [({"dp": 2, "pp": 2}, 3), ({"dp": 2, "tp": 2}, 2), ({"pp": 2, "tp": 2}, 0), ({"dp": 2, "cp": 2}, 1)]


def _document(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}


@pytest.mark.parametrize(("mesh", "stage"), [*MESHES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in MESHES[2:])])
def test_a_mesh_is_as_near_to_fp32_as_one_fp16_rank(mesh: dict[str, int], stage: int) -> None:
    config = config_of(**mesh, precision="fp16")  # type: ignore[arg-type]
    steps = parity.assemble(parity.on_mesh(config, _document(stage), steps=3), steps=3)
    assert not [finding for finding in compare_rounded(config, steps) if not finding.good]


def _overflow_once(rank: int, *, config: Config, stage: int, culprit: int) -> list[Any]:
    """Three steps, in the second of which one gradient of rank `culprit` alone is infinite after its reduction."""
    engine, seen = parity.start_engine(config, _document(stage)), []
    engine.zero.scale.value, number = 256.0, 0

    def spoil(pieces: list[Any]) -> None:
        if number == 1 and rank == culprit:
            next(piece for piece in pieces if piece.first).gradient[0] = float("inf")

    engine.zero.before_update = spoil
    for number in range(3):
        batch = parity.batch_of(config, number)
        mine = parity.microbatches(batch, config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
        report = engine.step(number, mine)
        pieces = engine.zero.pieces()
        state = [
            torch.cat([p.master for p in pieces]),
            *(torch.cat([p.moments[name] for p in pieces]) for name in ("exp_avg", "exp_avg_sq")),
        ]
        weights = torch.cat([p.flatten() for p in engine.zero.engine.module.parameters()]) if stage < 3 else None
        seen.append((report.skipped, engine.zero.scale.value, report.grad_norm, state, weights))
    return seen


@pytest.mark.parametrize(("mesh", "stage"), MESHES)
def test_one_rank_overflows_and_every_rank_skips(mesh: dict[str, int], stage: int) -> None:
    config = config_of(**mesh, precision="fp16")  # type: ignore[arg-type]
    work = functools.partial(_overflow_once, config=config, stage=stage, culprit=config.mesh.world - 1 if stage else 0)
    for first, second, third in launch.run_ranks(config.mesh.world, work, warm=("megalite.engine",)):
        assert [skipped for skipped, *_ in (first, second, third)] == [False, True, False]
        assert [scale for _, scale, *_ in (first, second, third)] == [256, 128, 128]
        assert second[2] == float("inf") or second[2] != second[2]
        for before, after, later in zip(first[3], second[3], third[3], strict=True):
            assert torch.equal(before, after), "a skipped step changed something"
            assert not torch.equal(after, later), "the step after it changed nothing"
        if stage < 3:
            assert torch.equal(first[4], second[4])


def _from_a_scale_too_high(rank: int, *, config: Config) -> list[tuple[bool, float]]:
    engine, seen = parity.start_engine(config, _document(3)), []
    engine.zero.scale.value = 2.0**26  # finite gradients, but not in fp16
    for _ in range(14):
        mine = parity.microbatches(parity.batch_of(config, 0), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
        report = engine.step(0, mine)
        seen.append((report.skipped, engine.zero.scale.value))
    return seen


def test_the_scale_falls_until_nothing_overflows() -> None:
    config = config_of(dp=2, pp=2, precision="fp16")
    ranks = launch.run_ranks(4, functools.partial(_from_a_scale_too_high, config=config), warm=("megalite.engine",))
    assert all(seen == ranks[0] for seen in ranks)
    skipped = [skipped for skipped, _ in ranks[0]]
    assert skipped == sorted(skipped, reverse=True) and skipped[0] and not skipped[-1]


def test_the_scale_doubles_after_good_steps_and_ends_below_one() -> None:
    scale = LossScale(value=4.0, patience=3)
    for _ in range(3):
        scale.update(overflow=False)
    assert (scale.value, scale.good_steps, scale.skipped) == (8, 0, 0)
    scale.update(overflow=False)
    scale.update(overflow=True)
    assert (scale.value, scale.good_steps, scale.skipped) == (4, 0, 1)
    scale.update(overflow=True)
    scale.update(overflow=True)
    with pytest.raises(UserError, match=r"overflow in fp16 even without a loss scale; use train\.precision = bf16"):
        scale.update(overflow=True)
