"""Saved on any layout, loaded on any other: every logical tensor has the same bits, and training goes on with the same losses.

Real engines. The slow part is every layout to every other for four models; `make test` runs three of them with one model.
"""

from __future__ import annotations

import functools
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite import launch, models
from megalite.checkpoint.store import KINDS, Store
from megalite.config import Checkpoint, Config
from megalite.tune import parity

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from compare import config_of

MODELS: dict[str, dict[str, Any]] = {
    "gpt2, tied": {},
    "llama, tied": {"style": "llama"},
    "llama, untied": {"style": "llama", "tied": False},
    "bert": {"family": "bert"},
}
HOST: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS: dict[str, tuple[dict[str, int], int, str]] = {  # name -> degrees, ZeRO stage, schedule; OFFLOADED has more of some
    "one rank": ({}, 0, "1f1b"),
    "dp2 zero3": ({"dp": 2}, 3, "1f1b"),
    "dp3 zero2": ({"dp": 3}, 2, "1f1b"),
    "dp2 pp2 zero1": ({"dp": 2, "pp": 2}, 1, "1f1b"),
    "pp4 zero3": ({"pp": 4}, 3, "gpipe"),
    "tp2 zero3": ({"tp": 2}, 3, "1f1b"),
    "tp4 zero1": ({"tp": 4}, 1, "1f1b"),
    "dp2 pp2 tp2 zero3": ({"dp": 2, "pp": 2, "tp": 2}, 3, "1f1b"),
    "dp3 pp2 zero3": ({"dp": 3, "pp": 2}, 3, "1f1b"),
    "dp2 tp2 zero0": ({"dp": 2, "tp": 2}, 0, "1f1b"),
    "pp2 interleaved zero2": ({"dp": 2, "pp": 2}, 2, "interleaved"),
    "pp2 zerobubble zero3": ({"dp": 2, "pp": 2}, 3, "zerobubble"),
    "dp2 cp2 zero3": ({"dp": 2, "cp": 2}, 3, "1f1b"),
    "dp2 zero2 offloaded": ({"dp": 2}, 2, "1f1b"),
    "dp2 pp2 zero3 offloaded": ({"dp": 2, "pp": 2}, 3, "1f1b"),
    "dp2 tp2 zero3 on disk": ({"dp": 2, "tp": 2}, 3, "1f1b"),
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "dp2 zero2 offloaded": HOST,
    "dp2 pp2 zero3 offloaded": {**HOST, "offload_param": {"device": "cpu"}},
    "dp2 tp2 zero3 on disk": {"offload_optimizer": {"device": "nvme", "nvme_path": tempfile.gettempdir()}},
}
Whole = dict[str, torch.Tensor]


def _config(model: str, layout: str, *, seed: int = 1234) -> Config:
    degrees, _, schedule = LAYOUTS[layout]
    config = config_of(**MODELS[model], **degrees, global_batch=24, schedule=schedule)
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})


def _step(engine: Any, number: int) -> float:
    batch = parity.batch_of(engine.config, number)
    mine = parity.microbatches(batch, engine.config, dp=engine.mesh.dp, dp_rank=engine.mesh.dp_rank)
    return engine.step(number, mine).loss


def _owned(engine: Any) -> dict[str, Any]:
    pieces = engine.zero.pieces()
    return {
        "weights": [(piece.cut, piece.start, piece.master.clone()) for piece in pieces],
        **{kind: [(piece.cut, piece.start, piece.moments[kind].clone()) for piece in pieces] for kind in KINDS[1:]},
    }


def _engine(config: Config, layout: str) -> Any:
    zero = {"stage": LAYOUTS[layout][1], "stage3_param_persistence_threshold": 0, **OFFLOADED.get(layout, {})}
    if zero["stage"] < 2:
        zero["reduce_bucket_size"] = 3000  # so that there are many parameter groups
    return parity.start_engine(config, {"zero_optimization": zero})


def _save(rank: int, *, model: str, layout: str, folder: Path, steps: int) -> tuple[dict[str, Any], list[float]]:
    """Two steps, save, go on for `steps`: what was saved, and the losses after it."""
    engine = _engine(_config(model, layout), layout)
    for number in range(2):
        _step(engine, number)
    with Store(folder, Checkpoint(), tied=models.tied(engine.config.model)) as store:
        owned = _owned(engine)
        store.save(2, engine.zero.pieces(), {"config": engine.config.model_dump(mode="json"), "state": engine.state()})
        losses = [_step(engine, number) for number in range(2, 2 + steps)]
    return owned, losses


def _load(rank: int, *, model: str, layout: str, folders: dict[str, Path], steps: int) -> list[tuple[dict[str, Any], list[float]]]:
    """Into one engine with other weights, one checkpoint after the other: what it then holds, and the losses of the steps after."""
    engine, answers = _engine(_config(model, layout, seed=7), layout), []
    _step(engine, 0)
    for folder in folders.values():
        store = Store(folder, Checkpoint(), tied=models.tied(engine.config.model))
        said = store.load(folder / "step-2", engine.zero.pieces())
        engine.restore(said["step"], said["state"])
        owned = _owned(engine)
        answers.append((owned, [_step(engine, number) for number in range(2, 2 + steps)]))
    return answers


def _run(layout: str, work: Any) -> list[Any]:
    degrees = LAYOUTS[layout][0]
    return launch.run_ranks(int(np.prod([*degrees.values(), 1])), work, warm=("megalite.engine",))


def _whole(owned: list[dict[str, Any]]) -> dict[str, Whole]:
    """Logical tensors; copies must be equal bit for bit."""
    return {kind: parity.put_together([rank[kind] for rank in owned]) for kind in KINDS}


def _check(model: str, sources: list[str], targets: list[str], folder: Path, *, steps: int) -> None:
    tied = models.tied(_config(model, "one rank").model)
    saved: dict[str, dict[str, Whole]] = {}
    losses: dict[str, list[float]] = {}
    for layout in sources:
        answers = _run(layout, functools.partial(_save, model=model, layout=layout, folder=folder / layout, steps=steps))
        saved[layout], losses[layout] = _whole([owned for owned, _ in answers]), answers[0][1]
    folders = {layout: folder / layout for layout in sources}
    for layout in targets:
        answers = _run(layout, functools.partial(_load, model=model, layout=layout, folders=folders, steps=steps))
        for number, source in enumerate(sources):
            loaded = _whole([answer[number][0] for answer in answers])
            for kind in KINDS:
                assert {tied.get(name, name) for name in loaded[kind]} == {tied.get(name, name) for name in saved[source][kind]}
                for name, tensor in loaded[kind].items():
                    wanted = saved[source][kind][tied.get(name, name)]
                    assert torch.equal(tensor, wanted), f"{source} -> {layout}: {kind} of {name}"
            ours, theirs = answers[0][number][1], losses[source]
            assert ours == pytest.approx(theirs, rel=1e-5), f"{source} -> {layout}: losses after it"
            if source == layout:
                assert ours == theirs, f"{layout}: not bit for bit"


@pytest.mark.slow
def test_what_is_offloaded_is_saved_and_loaded_like_anything_else(tmp_path: Path) -> None:
    chosen = ["pp2 interleaved zero2", "pp2 zerobubble zero3", "dp2 pp2 zero3 offloaded", "dp2 tp2 zero3 on disk"]
    _check("gpt2, tied", chosen, chosen, tmp_path, steps=2)


@pytest.mark.slow
def test_three_layouts_each_to_each_and_twenty_steps_on(tmp_path: Path) -> None:
    chosen = random.Random(5).sample(list(LAYOUTS), 3)
    _check("llama, tied", chosen, chosen, tmp_path, steps=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_to_every_layout(model: str, tmp_path: Path) -> None:
    _check(model, list(LAYOUTS), list(LAYOUTS), tmp_path, steps=2)


def test_a_step_draws_no_random_numbers(tmp_path: Path) -> None:
    """So there is no state of a generator to be saved."""

    def work(rank: int) -> None:
        engine = _engine(_config("gpt2, tied", "dp2 zero3"), "dp2 zero3")
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        for number in range(2):
            _step(engine, number)
        with Store(tmp_path, Checkpoint(), tied=models.tied(engine.config.model)) as store:
            store.save(2, engine.zero.pieces(), {"config": {}})
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]

    launch.run_ranks(2, work, warm=("megalite.engine",))
