"""The dry run beside real ranks: the same bytes at the peak, the same collectives, the same FLOPs."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import pytest

from megalite import launch
from megalite.config import Config
from megalite.tune.dryrun import real, trace

MESHES = {
    "dp 2": {"dp": 2},
    "dp 2 x pp 2": {"dp": 2, "pp": 2},
    "dp 2 x tp 2": {"dp": 2, "tp": 2},
    "pp 2 x tp 2": {"dp": 1, "pp": 2, "tp": 2},
}


def _config(mesh: dict[str, int], *, width: int = 32, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 4, "width": width, "heads": 4, "vocab": 50, "sequence": 16},
            "mesh": mesh,
            "train": {"global_batch": 8, "micro_batch": 2, "precision": "bf16", **train},
        }
    )


def _document(stage: int, *, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    zero["stage3_param_persistence_threshold"] = 100
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def _compare(mesh: dict[str, int], stage: int, *, offload: bool, first: bool = False, **train: Any) -> None:
    """The last rank, and the first one too if asked."""
    config, document = _config(mesh, **train), _document(stage, offload=offload)
    there = launch.run_ranks(config.mesh.world, functools.partial(real, config=config, document=document), warm=("megalite.engine",))
    for rank in {0 if first else config.mesh.world - 1, config.mesh.world - 1}:
        pretended = trace(config, document, rank=rank, gpu=False, owners=False)
        assert pretended.sent == there[rank].sent
        assert pretended.flops == there[rank].flops > 0
        assert pretended.start_up == there[rank].start_up
        assert pretended.peak == there[rank].peak


QUICK = [("dp 2 x pp 2", 2, False), ("dp 2", 3, False), ("pp 2 x tp 2", 1, True)]
ALL = [(mesh, stage, offload) for mesh, stage, offload in itertools.product(MESHES, range(4), (False, True)) if stage or not offload]


@pytest.mark.parametrize(("mesh", "stage", "offload"), QUICK)
def test_a_dry_run_holds_and_sends_what_a_real_rank_does_to_the_byte(mesh: str, stage: int, offload: bool) -> None:
    _compare(MESHES[mesh], stage, offload=offload)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "stage", "offload"), ALL)
def test_a_dry_run_is_exact_on_the_whole_matrix(mesh: str, stage: int, offload: bool) -> None:
    _compare(MESHES[mesh], stage, offload=offload, first=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp 2 x tp 2", "pp 2 x tp 2"])
def test_a_dry_run_is_exact_where_what_ranks_have_summed_is_kept(mesh: str) -> None:
    """And activations are most of what there is."""
    _compare(MESHES[mesh], 0, offload=False, first=True, recompute="selective", micro_batch=64, global_batch=128)


@pytest.mark.slow
def test_the_last_stage_keeps_no_received_state_of_microbatches_that_are_done() -> None:
    """torch keeps every loss with its graph until the step ends; the graph's leaf is a hidden state, and its gradient as large."""
    few, many = (
        trace(_config({"dp": 1, "pp": 2}, width=256, global_batch=2 * num), _document(0, offload=False), rank=1, gpu=False, owners=False)
        for num in (4, 16)
    )
    hidden = 2 * 16 * 256 * 2  # bytes of a microbatch's; with its gradient, 12 microbatches more would hold 24 of them
    assert many.peak["cpu"] - few.peak["cpu"] < 12 * hidden


def test_no_bucket_is_made_at_the_start_that_nobody_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's stage 3 makes one of reduce_bucket_size elements, 1 GB by default."""
    monkeypatch.setattr("megalite.tune.dryrun.STEPS", 0)
    document = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 10_000_000}}
    held = trace(_config({"dp": 2}), document, rank=0, gpu=False, owners=False).start_up["cpu"]
    assert 0 < held < 2 * 10_000_000


@pytest.mark.parametrize(
    ("schedule", "pp", "states"),
    [
        pytest.param(
            "interleaved", 2, 15, marks=pytest.mark.long
        ),  # of 8 microbatches, 8 outputs that were sent on, and 16 gradients sent back
        ("1f1b", 3, 2),  # one of the first outputs, and the gradient that was sent last
    ],
)
def test_torch_keeps_what_was_sent(monkeypatch: pytest.MonkeyPatch, schedule: str, pp: int, states: int) -> None:
    """If this fails, `_letting_go_of_what_travelled` in parallel/pipeline.py is no longer needed."""
    monkeypatch.setattr("megalite.tune.dryrun.STEPS", 1)
    config = _config({"dp": 1, "pp": pp}, global_batch=128, micro_batch=16, schedule=schedule)
    ours = trace(config, _document(0, offload=False), rank=1, gpu=False, owners=False)
    monkeypatch.setattr("megalite.parallel.pipeline._letting_go_of_what_travelled", contextlib.nullcontext)
    theirs = trace(config, _document(0, offload=False), rank=1, gpu=False, owners=False)
    hidden = 16 * 16 * 32 * 2  # bytes of a microbatch's
    assert ours.sent == theirs.sent
    assert theirs.peak["cpu"] - ours.peak["cpu"] >= states * hidden


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_torch_keeps_weights_of_a_layer_that_runs_again(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """If this fails, `_weights_as_they_are` in parallel/recompute.py is no longer needed."""
    monkeypatch.setattr("megalite.tune.dryrun.STEPS", 1)
    config = _config({"dp": 2}, width=256, micro_batch=256, global_batch=512, recompute=kind)  # fullest where a block goes back
    limits = {"stage3_max_live_parameters": 1000, "stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    document = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, **limits}}
    ours = trace(config, document, rank=0, gpu=False, owners=False)
    monkeypatch.setattr("megalite.parallel.recompute._weights_as_they_are", contextlib.nullcontext)
    theirs = trace(config, document, rank=0, gpu=False, owners=False)
    attention = 2 * 4 * 256 * 256  # bytes of two of its matrices and more, in bf16
    assert ours.sent == theirs.sent
    assert theirs.peak["cpu"] - ours.peak["cpu"] > attention
