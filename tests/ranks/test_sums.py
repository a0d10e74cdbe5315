"""Gradients over microbatches and ranks: how often they travel, when, and what comes of it."""

from __future__ import annotations

import functools
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite import launch, models
from megalite.config import Config
from megalite.parallel import zero
from megalite.parallel.buckets import Bucket, Buckets, _put_flat
from megalite.parallel.sums import MicrobatchSums, StepSums, Sums
from megalite.tune import parity

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from compare import assert_same, config_of, on_mesh, reference

MESHES = [{"dp": 2}, {"dp": 2, "pp": 2, "layers": 4, "schedule": "interleaved"}]


def _told(rank: int, *, config: Config, stage: int, overlap: bool) -> tuple[int, list[str]]:
    """How many buckets this rank has, and what happens in its second step: "put" where a gradient goes into one, "sent" where a transfer
    begins, "there" where it is waited for, "back" where a backward pass ends."""
    zero = {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 0, "overlap_comm": overlap}
    engine, told = parity.start_engine(config, {"zero_optimization": zero}), []
    backward, put, scatter, share = engine.zero.backward, engine.zero.sums.put, dist.reduce_scatter_tensor, dist.all_reduce

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            told.append("there")
            self.work.wait()

    def sent(call: Any, *args: Any, **how: Any) -> Any:
        if not how.get("async_op"):
            return call(*args, **how)
        told.append("sent")
        return Watched(call(*args, **how))

    dist.reduce_scatter_tensor, dist.all_reduce = functools.partial(sent, scatter), functools.partial(sent, share)
    engine.zero.backward = lambda *args: (backward(*args), told.append("back"))
    engine.zero.sums.put = lambda *args: (told.append("put"), put(*args))
    for step in range(2):
        told.clear()
        mine = parity.microbatches(parity.batch_of(config, step), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
        engine.step(step, mine)
    return len(engine.zero.sums.buckets.every), told


def _run(config: Config, stage: int, *, overlap: bool = True) -> list[tuple[int, list[str]]]:
    work = functools.partial(_told, config=config, stage=stage, overlap=overlap)
    return launch.run_ranks(config.mesh.world, work, warm=("megalite.engine",))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_travel_once_a_step_and_most_of_them_during_the_last_backward_pass(mesh: dict[str, Any], stage: int) -> None:
    config = config_of(**mesh, reduce="step")
    passes = config.train.global_batch // (2 * config.train.micro_batch) * config.num_chunks
    for num, told in _run(config, stage):
        first, last = told.index("sent"), len(told) - told[::-1].index("back") - 1
        assert told.count("back") == passes
        assert told[:first].count("back") >= passes - config.num_chunks * config.mesh.pp, "only a microbatch that is a chunk's last"
        early = told[:last].count("sent")
        assert 3 <= told.count("sent") == early == num, "all are under way when the last backward pass is over"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_that_travel_every_microbatch_do_so_one_bucket_at_a_time_beside_the_backward_pass(
    mesh: dict[str, Any], stage: int
) -> None:
    config = config_of(**mesh)
    microbatches = config.train.global_batch // (2 * config.train.micro_batch)
    for num, told in _run(config, stage):
        each = [words.split() for words in " ".join(told).split("back")]
        assert len(each) == microbatches * config.num_chunks + 1 and not each[-1]
        for events in each:
            found = [event for event in events if event != "put"]
            assert found == ["sent", "there"] * (len(found) // 2), "one is added up before the next is sent, and all at the end"
        assert told.count("sent") == num * microbatches, "each is full when it goes: no backward pass goes through a part of one"
        assert ("sent", "put") in pairwise(told), "the backward pass goes on"


@pytest.mark.parametrize("stage", [2, 3])
def test_without_overlap_the_backward_pass_waits(stage: int) -> None:
    for _, told in _run(config_of(dp=2), stage, overlap=False):
        assert {after for event, after in pairwise(told) if event == "sent"} == {"there"}


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_one_rank_go_nowhere(stage: int) -> None:
    assert all("put" in told and "sent" not in told for _, told in _run(config_of(dp=1, pp=2), stage))


@pytest.mark.parametrize(
    "keys", [{"gradient_predivide_factor": 3.0}, {"prescale_gradients": True}, {"zero_optimization": {"overlap_comm": False}}]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_way_to_travel_makes_no_difference(keys: dict[str, Any], stage: int) -> None:
    config = config_of(dp=3, global_batch=12)
    document = {**keys, "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, **keys.get("zero_optimization", {})}}
    assert_same(on_mesh(config, zero=document), reference(config), tied=models.tied(config.model))


def _types(rank: int, *, config: Config, document: dict[str, Any]) -> set[torch.dtype]:
    engine, scatter, seen = parity.start_engine(config, document), dist.reduce_scatter_tensor, set()

    def watch(out: Tensor, buffer: Tensor, **how: Any) -> Any:
        seen.add(buffer.dtype)
        return scatter(out, buffer, **how)

    dist.reduce_scatter_tensor = watch
    engine.step(0, parity.microbatches(parity.batch_of(config, 0), config, dp=2, dp_rank=engine.mesh.dp_rank))
    return seen


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_travel_in_the_type_of_the_weights_or_as_the_json_says(stage: int) -> None:
    config = config_of(dp=2, precision="bf16")
    for keys, dtype in (({}, torch.bfloat16), ({"communication_data_type": "fp32"}, torch.float32)):
        work = functools.partial(_types, config=config, document={**keys, "zero_optimization": {"stage": stage}})
        assert launch.run_ranks(2, work, warm=("megalite.engine",)) == [{dtype}] * 2


def _mean(gradient: Tensor) -> Tensor:
    """This rank's part of the mean, without padding, as DeepSpeed's quantized reduction leaves it."""
    num, rank, flat = dist.get_world_size(), dist.get_rank(), gradient.clone().view(-1)
    dist.all_reduce(flat)
    length = -(-len(flat) // num)
    return flat[rank * length : (rank + 1) * length] / num


def test_another_reduction_may_take_the_place_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """As quantized gradients do, on more than one node with GPUs."""
    monkeypatch.setattr(zero, "_exchange", lambda inner: _mean)
    config = config_of(dp=3, global_batch=12)
    assert_same(on_mesh(config, zero=3), reference(config), tied=models.tied(config.model))


class _Given(Buckets):
    """Buckets as they are given; keeps what is handed over."""

    def __init__(self, every: list[Bucket]) -> None:
        self.every, self.parts = every, [bucket.host for bucket in every]

    def cut(self) -> list[Bucket]:
        return self.every

    def hand_over(self, parts: list[Tensor]) -> None:
        self.parts = list(parts)


def _unused(rank: int, *, kind: str, offloaded: bool) -> list[Tensor]:
    """Three weights in two buckets, three microbatches, in which the second and the third weight are used 2 times and never."""
    weights, stale = [nn.Parameter(torch.ones(4)) for _ in range(3)], torch.full((2, 4), 7.0)
    puts = [(weights[0], functools.partial(_put_flat, 0, torch.Size([4]))), (weights[1], functools.partial(_put_flat, 4, torch.Size([4])))]
    lone = [(weights[2], functools.partial(_put_flat, 0, torch.Size([4])))]
    buckets = _Given([Bucket(8, puts, stale[0] if offloaded else None), Bucket(4, lone, stale[1, :2] if offloaded else None)])
    group, device = dist.group.WORLD, torch.device("cpu")
    sums: Sums = (
        StepSums(buckets, group, device=device) if kind == "step" else MicrobatchSums(buckets, group, device=device, dtype=torch.float32)
    )
    for _ in range(2):  # steps
        sums.begin(3)
        for number in range(3):
            scalar = (weights[0] * (rank + 1)).sum()
            (scalar + (weights[1] * number * (rank + 1)).sum() if number else scalar).backward()
            sums.end_pass()
        sums.reduce()
    return [part.clone() for part in buckets.parts]


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("kind", ["step", "microbatch"])
def test_what_has_no_gradient_counts_as_zero_and_a_step_knows_nothing_of_the_one_before(kind: str, offloaded: bool) -> None:
    first, second = launch.run_ranks(2, functools.partial(_unused, kind=kind, offloaded=offloaded))
    assert [part.tolist() for part in first] == [[4.5] * 4, [0.0] * 2]  # three times the mean of 1 and 2
    assert [part.tolist() for part in second] == [[4.5] * 4, [0.0] * 2]  # 0 + 1 + 2 times it
