"""Gradients that are reduced once a step: how often, and when."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalite import launch
from megalite.config import Config
from megalite.tune import parity

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from compare import config_of


def _told(rank: int, *, config: Config, stage: int) -> list[str]:
    """What happens in the second step of this rank: "back" where a backward pass ends, "sent" where a transfer of gradients begins."""
    document = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 0}}
    engine, told = parity.start_engine(config, document), []
    backward, scatter, share = engine.zero.backward, dist.reduce_scatter_tensor, dist.all_reduce

    def sent(call: Any, *args: Any, **how: Any) -> Any:
        if how.get("async_op"):
            told.append("sent")
        return call(*args, **how)

    dist.reduce_scatter_tensor, dist.all_reduce = functools.partial(sent, scatter), functools.partial(sent, share)
    engine.zero.backward = lambda scalar: (backward(scalar), told.append("back"))
    for step in range(2):
        told.clear()
        engine.step(step, parity.microbatches(parity.batch_of(config, step), config, dp=2, dp_rank=engine.mesh.dp_rank))
    return told


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"dp": 2, "pp": 2, "layers": 4, "schedule": "interleaved"}])
def test_gradients_travel_once_a_step_and_most_of_them_during_the_last_backward_pass(mesh: dict[str, Any], stage: int) -> None:
    config = config_of(**mesh, reduce="step")
    passes = config.train.global_batch // (2 * config.train.micro_batch) * config.num_chunks
    for told in launch.run_ranks(config.mesh.world, functools.partial(_told, config=config, stage=stage), warm=("megalite.engine",)):
        first, last = told.index("sent"), len(told) - told[::-1].index("back") - 1
        assert told.count("back") == passes
        assert told[:first].count("back") >= passes - config.num_chunks * config.mesh.pp, "only a microbatch that is a chunk's last"
        early = told[:last].count("sent")
        assert 3 <= told.count("sent") == early, "all are under way when the last backward pass is over"
