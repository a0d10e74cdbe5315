"""What selective recomputation keeps of a block: what the second run asks for. That the numbers are right, tests/parity says."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalite import launch
from megalite.config import Config
from megalite.parallel.recompute import run_selective

WIDTH, HEADS, SEQUENCE, MICRO = 64, 4, 64, 4


def _config(*, family: str = "gpt", tp: int = 1, cp: int = 1, split: bool = False) -> Config:
    model = {"family": family, "layers": 3, "width": WIDTH, "heads": HEADS, "vocab": 60, "sequence": SEQUENCE}
    train = {"global_batch": MICRO, "micro_batch": MICRO, "precision": "fp32", "recompute": "selective", "sequence_parallel": split}
    return Config.model_validate({"model": model, "mesh": {"tp": tp, "cp": cp}, "train": train})


def _held(rank: int, *, config: Config) -> tuple[int, bool]:
    """Bytes that a block's forward pass leaves behind, input and output not counted; and whether all of it goes with the output."""
    from megalite.parallel.pretend import let_go_when_waited_for
    from megalite.tune.ledger import Ledger
    from megalite.tune.parity import batch_of, start_engine

    gc.disable()
    let_go_when_waited_for()
    with Ledger() as ledger:
        engine = start_engine(config, {})
        stage, mesh = engine.zero.engine.module, engine.mesh
        (batch,) = engine._deal([batch_of(config, 0)])
        share = mesh.cp * (mesh.tp if config.train.sequence_parallel else 1)
        x = torch.randn(MICRO, SEQUENCE // share, WIDTH, requires_grad=True) * 1.0
        before = ledger.alive["cpu"]
        y = stage.again(stage.get_submodule("layers.1"), x, batch)
        held = ledger.alive["cpu"] - before - y.untyped_storage().nbytes()
        gone, _ = weakref.ref(x), y.sum().backward()
        del x, y
        return held, gone() is None


@pytest.mark.parametrize(
    ("layout", "columns"),
    [
        # queries, keys and values; what attention puts out; its projection; the MLP's first product
        ({}, 3 + 1 + 1 + 4),
        ({"family": "bert"}, 3 + 1 + 1 + 4 + 1),  # a norm comes last, and saves what the MLP puts out
        ({"tp": 2}, 3 / 2 + 1 / 2 + 1 + 4 / 2),  # the projection's sum over ranks, and not what was summed
        ({"tp": 2, "split": True}, 3 / 2 + 1 / 2 + 1 / 2 + 4 / 2),
        ({"cp": 2}, (3 + 1 + 1 + 1 + 4) / 2),  # queries, keys and values for whole sequences, and not as they were sent
    ],
)
def test_a_block_keeps_what_is_asked_for_when_it_runs_again(layout: dict[str, Any], columns: float) -> None:
    config = _config(**layout)
    tokens, heads = MICRO * SEQUENCE, HEADS / config.mesh.tp / config.mesh.cp
    for held, gone in launch.run_ranks(config.mesh.world, functools.partial(_held, config=config), warm=("megalite.engine",)):
        assert held == 4 * tokens * (columns * WIDTH + heads)  # and a number for every row of attention
        assert gone


class _Sums(nn.Module):
    """x -> x A summed over ranks, times x A: too late to ask for it."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group, self.weight = group, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        from megalite.parallel import collectives

        y = x @ self.weight
        return collectives.reduce(y, self.group) * y


def _too_late(rank: int) -> None:
    from megalite.mesh import Mesh

    mesh = Mesh.start(dp=1, pp=1, cp=1, tp=1, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="gone to other ranks alone"):
        run_selective(_Sums(mesh.group("tp")), torch.randn(2, 4, requires_grad=True), {})


def test_what_goes_to_other_ranks_and_is_used_afterwards_too_is_refused() -> None:
    launch.run_ranks(1, _too_late)
