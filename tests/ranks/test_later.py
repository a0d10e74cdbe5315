"""Halved backward passes: what the first half leaves out, how long it waits, and what the second half needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalite import launch
from megalite.config import Config
from megalite.parallel import gather, later

MODEL = {"layers": 6, "width": 32, "heads": 2, "vocab": 50, "sequence": 16}


def _events(rank: int, *, config: Config, document: dict[str, Any]) -> list[str]:
    """What a rank does in the second step: `half`, a first half of a pass ends; `rest`, a second one; between them `product`, a gradient of
    a weight of a block; `fetch`, weights of ZeRO-3 come.
    """
    from megalite.tune.parity import batch_of, microbatches, start_engine

    told: list[str] = []

    def tell(what: str, owner: Any, name: str, *, after: bool = False) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def told_of(*args: Any, **kwargs: Any) -> Any:
            if not after:
                told.append(what)
            found = plain(*args, **kwargs)
            if after:
                told.append(what)
            return found

        setattr(owner, name, told_of)

    make = later.gradients

    def without_a_graph(x: torch.Tensor, grad: torch.Tensor, *, biased: bool) -> Any:
        assert x.grad_fn is None and grad.grad_fn is None, "it would hold all that it came of until now"
        return make(x, grad, biased=biased)

    later.gradients = without_a_graph
    tell("product", later, "gradients")
    tell("fetch", gather.Gathering, "_fetch")
    tell("half", later.Later, "held")
    tell("rest", later.Later, "_catch_up", after=True)
    engine = start_engine(config, document)
    for step in range(2):
        told.clear()
        engine.step(step, microbatches(batch_of(config, step), config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank))
    return told


def _sent(rank: int, *, config: Config, stage: int) -> tuple[int, int]:
    """Buckets, and how often one was sent in a step."""
    from megalite.tune.parity import batch_of, microbatches, start_engine

    engine = start_engine(config, {"zero_optimization": {"stage": stage}})
    send, times = engine.zero.sums.send, []

    def counted(number: int) -> None:
        times.append(number)
        send(number)

    engine.zero.sums.send = counted  # type: ignore[method-assign]
    engine.step(0, microbatches(batch_of(config, 0), config, dp=2, dp_rank=engine.mesh.dp_rank))
    return len(engine.zero.sums.buckets.every), len(times)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bucket_is_sent_once_a_pass(stage: int) -> None:
    """Norms and biases share one: the former have gradients in the first half, of another microbatch than the latter."""
    train = {"global_batch": 8, "micro_batch": 1, "precision": "fp32", "schedule": "zerobubble"}
    config = Config.model_validate({"model": MODEL, "mesh": {"dp": 2, "pp": 2}, "train": train})
    for buckets, sent in launch.run_ranks(4, functools.partial(_sent, config=config, stage=stage), warm=("megalite.engine",)):
        assert sent == 4 * buckets


@pytest.mark.parametrize(("chunks", "stage"), [(1, 2), (2, 3)])
def test_weights_wait_for_as_many_microbatches_as_there_are_ranks_before(chunks: int, stage: int) -> None:
    config = Config.model_validate(
        {
            "model": MODEL,
            "mesh": {"dp": 1, "pp": 4},
            "train": {"global_batch": 8, "micro_batch": 1, "precision": "fp32", "schedule": "zerobubble", "chunks": chunks},
        }
    )
    # a limit that no stage fits into: weights come and go
    zero = {"stage": stage, "stage3_max_live_parameters": 5000, "stage3_param_persistence_threshold": 0}
    work = functools.partial(_events, config=config, document={"zero_optimization": zero})
    for rank, told in enumerate(launch.run_ranks(4, work, warm=("megalite.engine",))):
        assert told.count("half") == told.count("rest") == 8 * chunks
        halves, most = 0, 0
        for number, what in enumerate(told):
            halves += {"half": 1, "rest": -1}.get(what, 0)
            most = max(most, halves)
            if what == "rest":  # since the last event of another kind, gradients of weights alone
                begun = max((place for place in range(number) if told[place] in ("half", "rest", "fetch")), default=-1)
                assert set(told[begun + 1 : number]) <= {"product"}
        assert most == rank + 1, "the one that has just gone back, and one for every rank before"
        assert (stage == 3) == ("fetch" in told)
        products = [place for place, what in enumerate(told) if what == "product"]
        assert len(products) % (4 * 8) == 0, "four products a block and microbatch"
        for place in products:
            behind = next(what for what in told[place:] if what != "product")
            assert behind == "rest", "none is made in a first half"
