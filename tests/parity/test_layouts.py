"""Every layout computes what one process of plain PyTorch computes: loss, gradient norm, every gradient, every updated weight, three steps.

The whole table is meshes x ZeRO and reduction x schedules x models; `make parity` runs all of it. `make test` runs every ZeRO on one axis
and on all three, every schedule with it, and ZeRO-1 and 3 on every mesh, the models in turn.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
from typing import Any

import pytest
import torch
from compare import STEPS, Step, assert_same, config_of, on_mesh, reference

from megalite import launch, models
from megalite.config import CHUNKED, Config
from megalite.errors import UserError
from megalite.tune.parity import batch_of, masters, put_together, start_engine

MODELS = {
    "gpt2-tied": {"style": "gpt2", "tied": True},
    "gpt2-untied": {"style": "gpt2", "tied": False},
    "llama-tied": {"style": "llama", "tied": True},
    "llama-untied": {"style": "llama", "tied": False},
    "bert": {"family": "bert"},
}
MESHES = {
    "dp3": {"dp": 3},
    "pp3": {"pp": 3},
    "tp4": {"tp": 4},
    "dp2-tp2": {"dp": 2, "tp": 2},
    "pp2-tp2": {"pp": 2, "tp": 2},
    "dp2-pp2": {"dp": 2, "pp": 2},
    "dp2-pp2-tp2": {"dp": 2, "pp": 2, "tp": 2},
}
ZEROS = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2-microbatch": (2, {"reduce": "microbatch"}),
    "zero2-step": (2, {"reduce": "step"}),
    "zero3-microbatch": (3, {"reduce": "microbatch"}),
    "zero3-step": (3, {"reduce": "step"}),
}
SCHEDULES = ("1f1b", "gpipe", "interleaved", "looped", "zerobubble")
WHOLE = ("dp3", "dp2-pp2", "dp2-pp2-tp2")  # meshes on which `make test` tries every ZeRO
LONG, SLOW = pytest.mark.long, pytest.mark.slow


def _ranks(degrees: dict[str, Any]) -> int:
    return math.prod(degrees.get(axis, 1) for axis in ("dp", "pp", "cp", "tp"))


def _cases() -> list:
    cases, turn = [], 0
    for (row, mesh), (column, zero), (depth, schedule) in itertools.product(*map(enumerate, (MESHES, ZEROS, SCHEDULES))):
        if "pp" not in mesh and schedule in CHUNKED:
            continue
        # the schedules in turn; without a pipeline there is one, whatever its name
        often = depth == (row + column) % len(SCHEDULES) if "pp" in mesh else schedule == "1f1b"
        often = often and (mesh in WHOLE or zero in ("zero1", "zero3-microbatch"))
        turn += often
        quick = _ranks(MESHES[mesh]) < 8 or zero in ("zero1", "zero3-microbatch")
        for place, model in enumerate(MODELS):
            marks = (SLOW,) if not often or place != turn % len(MODELS) else () if quick else (LONG,)
            cases.append(pytest.param(mesh, zero, schedule, model, marks=marks, id=f"{mesh}-{zero}-{schedule}-{model}"))
    return cases


def _alive() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process refers to, by address."""
    gc.collect()
    storages = [found.untyped_storage() for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@functools.cache
def _plain(model: str, global_batch: int, layers: int = 3) -> list[Step]:
    return reference(config_of(**MODELS[model], layers=layers, global_batch=global_batch))


def _config(mesh: str, model: str, **train: object) -> Config:
    """Four microbatches a step on every mesh, more than there are stages."""
    degrees = MESHES.get(mesh, {})
    batch = {"global_batch": 24 if mesh == "dp3" else 16, "micro_batch": 2 if "dp" in degrees else 4}
    return config_of(**MODELS[model], **degrees, **{**batch, **train})


@pytest.mark.parametrize(("mesh", "zero", "schedule", "model"), _cases())
def test_a_mesh_computes_what_one_process_computes(mesh: str, zero: str, schedule: str, model: str) -> None:
    stage, reduce = ZEROS[zero]
    layers = 4 if schedule in CHUNKED else 3  # 2 chunks on each of 3 stages: 6 layers with embedding and head
    config = _config(mesh, model, layers=layers, schedule=schedule, **reduce)
    assert_same(on_mesh(config, zero=stage), _plain(model, config.train.global_batch, layers), tied=models.tied(config.model))


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=SLOW) for stage in range(3)), 3])
def test_bf16_on_a_mesh_is_as_near_to_fp32_as_bf16_on_one_rank(stage: int) -> None:
    """The 2x rule: the error of a mesh against fp32 is at most twice that of one rank, same type, against fp32.

    Errors are those of whole gradients, |a - b| / |b| in the 2-norm: roundings are random, and the largest of them is a lottery.
    """
    truth = _plain("gpt2-tied", 16)
    ours = on_mesh(_config("dp2-pp2-tp2", "gpt2-tied", precision="bf16"), zero=stage)
    alone = on_mesh(config_of(**MODELS["gpt2-tied"], precision="bf16"))
    for number in range(STEPS):
        for name, exact in truth[number].gradients.items():
            error, allowed = (((run[number].gradients[name] - exact).norm() / exact.norm()).item() for run in (ours, alone))
            # below 2^-8, the rounding of bf16 itself, an error of one rank says only that its roundings happened to cancel
            assert error <= 2 * max(allowed, 2**-8), f"step {number}: {name} is off by {error:.1e}, one rank by {allowed:.1e}"
        loss = truth[number].loss
        assert abs(ours[number].loss - loss) <= 2 * max(abs(alone[number].loss - loss), 2**-8 * loss)


def test_small_weights_that_stay_gathered_are_updated_too() -> None:
    """stage3_param_persistence_threshold keeps small parameters whole between steps; they must be renewed after each."""
    config = _config("dp2-pp2", "gpt2-tied")
    document = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}
    assert_same(on_mesh(config, zero=document), _plain("gpt2-tied", 16), tied=models.tied(config.model))


STAY = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # DeepSpeed's limits are far above such a model


@pytest.mark.parametrize(
    ("mesh", "model", "train"),
    [
        ("dp2-pp2", "gpt2-tied", {"schedule": "interleaved", "layers": 6}),
        ("dp2-pp2-tp2", "llama-untied", {"schedule": "gpipe", "recompute": "full"}),
        ("dp2", "bert", {"reduce": "step", "recompute": "selective"}),
        ("pp2-tp2", "gpt2-tied", {"recompute": "full"}),
    ],
)
def test_weights_of_a_stage_that_stay_for_a_step_compute_the_same(mesh: str, model: str, train: dict[str, Any]) -> None:
    config = _config(mesh, model, **train)
    assert_same(on_mesh(config, zero=STAY), reference(config), tied=models.tied(config.model))


@pytest.mark.parametrize(
    ("mesh", "zero", "model", "train"),
    [
        pytest.param("dp2-pp2", STAY, "gpt2-tied", {}, marks=LONG),
        pytest.param("dp2", 2, "llama-untied", {"recompute": "full"}, marks=pytest.mark.slow),
        pytest.param("dp2-pp2", 1, "bert", {"schedule": "interleaved", "layers": 4}, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_compute_the_same(mesh: str, zero: Any, model: str, train: dict[str, Any]) -> None:
    config = _config(mesh, model, compile=True, **train)
    assert_same(on_mesh(config, zero=zero), reference(config), tied=models.tied(config.model))


def test_blocks_are_compiled_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ZeroDivisionError("asked to compile")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(Exception, match="asked to compile"):
        on_mesh(_config("dp2", "gpt2-tied", compile=True), zero=STAY)


def test_blocks_whose_weights_come_and_go_are_not_compiled() -> None:
    with pytest.raises(UserError, match=r"train.compile needs the weights of a stage to stay .*, but of 88,896 ZeRO-3 may keep 53,337"):
        on_mesh(_config("dp2", "gpt2-tied", compile=True), zero=3)


def test_layers_that_do_not_divide_are_split_unevenly_and_compute_the_same() -> None:
    config = config_of(pp=4, layers=5, micro_batch=2)
    assert_same(on_mesh(config, zero=3), reference(config), tied=models.tied(config.model))


def test_without_clipping_nothing_is_clipped() -> None:
    config = _config("dp2-tp2", "llama-untied", clip=0.0)
    plain = reference(config.model_copy(update={"train": config.train.model_copy(update={"clip": 1e9})}))
    assert_same(on_mesh(config, zero=2), plain, tied={})


RECOMPUTED = [
    ("dp2-pp2-tp2", "zero3-microbatch", "interleaved", "gpt2-tied"),
    ("dp2-pp2", "zero3-step", "gpipe", "bert"),
    ("dp2-tp2", "zero3-microbatch", "1f1b", "llama-untied"),
    ("pp2-tp2", "zero1", "1f1b", "llama-tied"),
    ("dp2-pp2", "zero2-microbatch", "interleaved", "gpt2-untied"),
]


@pytest.mark.parametrize(
    ("mesh", "zero", "schedule", "model", "how"),
    [
        pytest.param(*case, how, marks=() if (place + turn) % 2 and _ranks(MESHES[case[0]]) < 8 else (SLOW,))
        for place, case in enumerate(RECOMPUTED)
        for turn, how in enumerate(("full", "selective"))
    ],
)
def test_blocks_that_compute_again_in_the_backward_pass_compute_the_same(mesh: str, zero: str, schedule: str, model: str, how: str) -> None:
    stage, reduce = ZEROS[zero]
    config = _config(mesh, model, layers=4, schedule=schedule, recompute=how, **reduce)
    assert_same(on_mesh(config, zero=stage), _plain(model, config.train.global_batch, 4), tied=models.tied(config.model))


def test_only_the_first_blocks_of_a_chunk_compute_again() -> None:
    config = _config("dp2-pp2", "gpt2-tied", layers=6, recompute="selective", recompute_layers=1)
    assert_same(on_mesh(config, zero=3), _plain("gpt2-tied", 16, 6), tied=models.tied(config.model))


@pytest.mark.parametrize("model", ["gpt2-tied", "llama-untied", "bert"])
def test_recomputation_keeps_little_for_the_backward_pass(model: str) -> None:
    """Bytes kept in one forward pass, weights not counted: a block of width d keeps d a token, some 10 d selectively, else 20 d or more."""
    kept = {}
    for how, layers in (("none", None), ("full", None), ("selective", None), ("full", 4)):
        config = _config("pp1", model, layers=8, recompute=how, recompute_layers=layers)
        (kept[how, layers],) = launch.run_ranks(1, functools.partial(_kept, config=config))
    assert kept["full", None] < kept["none", None] / 4
    assert kept["full", None] < kept["selective", None] < 0.8 * kept["none", None]
    half = (kept["none", None] + kept["full", None]) / 2
    assert kept["full", 4] == pytest.approx(half, rel=0.1)


def _kept(rank: int, *, config: Config) -> int:
    """What autograd saves in a forward pass, and what Python holds more after it (selective recomputation's own store)."""
    engine = start_engine(config, {})
    batch = {name: value[:2] for name, value in batch_of(config, 0).items()}
    batch["weights"], batch["pair_weights"] = torch.ones(batch["ids"].shape), torch.ones(2)
    before, saved = _alive(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = engine.zero.engine.module(batch["ids"], batch).sum()
    assert loss.requires_grad
    return sum(size for place, size in {**_alive(), **saved}.items() if place not in before)


@pytest.mark.parametrize(("mesh", "zero"), [("dp2-pp2-tp2", 3), ("tp4", 2), ("pp3", 0)])
@pytest.mark.parametrize("model", ["llama-untied", "bert"])
def test_initial_weights_are_a_function_of_seed_and_name(mesh: str, zero: int, model: str) -> None:
    config = _config(mesh, model)
    document = {"zero_optimization": {"stage": zero}}
    ranks = launch.run_ranks(config.mesh.world, lambda rank: masters(start_engine(config, document)), warm=("megalite.engine",))
    whole = models.build(config.model, seed=config.run.seed)
    for name, weight in put_together(ranks).items():
        assert torch.equal(weight, whole.get_parameter(models.tied(config.model).get(name, name))), name


# ---- sequences cut over tensor-parallel and context-parallel ranks, dropout --------------------------------------------------------------

CUT = {
    "cp2": ({"cp": 2}, 3),
    "dp2-cp2-pp2": ({"dp": 2, "cp": 2, "pp": 2}, 3),
    "cp4": ({"cp": 4}, 2),
    "cp2-tp2": ({"cp": 2, "tp": 2}, 0),
    "tp2-split": ({"tp": 2, "sequence_parallel": True}, 3),
    "dp2-tp2-split": ({"dp": 2, "tp": 2, "sequence_parallel": True}, 1),
    "pp2-tp2-split": ({"pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "interleaved"}, 3),
    "cp2-pp2-tp2-split": ({"cp": 2, "pp": 2, "tp": 2, "sequence_parallel": True}, 2),
    "dp2-pp2-tp2-split": ({"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": True, "recompute": "selective"}, 3),
}


def _cut_cases() -> list:
    """Every cut with one of the models in turn, and the rest of them marked slow, as eight ranks are."""
    pairs = itertools.product(enumerate(CUT), enumerate(("gpt2-tied", "llama-untied", "bert")))
    often = [(turn - place) % 3 == 0 and _ranks(CUT[cut][0]) < 8 for (turn, cut), (place, _) in pairs]
    pairs = itertools.product(CUT, ("gpt2-tied", "llama-untied", "bert"))
    return [pytest.param(*pair, marks=() if quick else (SLOW,)) for pair, quick in zip(pairs, often, strict=True)]


@pytest.mark.parametrize(("cut", "model"), _cut_cases())
def test_sequences_cut_over_ranks_compute_what_whole_ones_do(cut: str, model: str) -> None:
    settings, stage = CUT[cut]
    config = config_of(**MODELS[model], layers=4, **settings)
    assert_same(on_mesh(config, zero=stage), _plain(model, 16, 4), tied=models.tied(config.model))


@SLOW
def test_fewer_key_heads_than_context_parallel_ranks_are_shared() -> None:
    """8 query heads over 4 ranks, 2 key heads: each is repeated twice, and its gradient is the sum of both."""
    config = config_of(**MODELS["llama-untied"], cp=4)
    config = config.model_copy(update={"model": config.model.model_copy(update={"kv_heads": 2})})
    assert_same(on_mesh(config, zero=3), reference(config), tied={})


DROPPED = [("dp2-cp2-pp2", "gpt2-tied"), ("dp2-pp2-tp2-split", "llama-untied"), ("cp2-tp2", "bert")]


@pytest.mark.parametrize(
    ("cut", "model"),
    [
        pytest.param(cut, model, marks=() if (cut, model) in DROPPED and _ranks(CUT[cut][0]) < 8 else (SLOW,))
        for cut, model in itertools.product([cut for cut, _ in DROPPED], [model for _, model in DROPPED])
    ],
)
def test_every_mesh_drops_what_one_process_drops(cut: str, model: str) -> None:
    settings, stage = CUT[cut]
    config = config_of(**MODELS[model], **settings)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.1, "attention_dropout": 0.2})})
    plain = reference(config)
    assert abs(plain[0].loss - _plain(model, 16)[0].loss) > 1e-3, "nothing was dropped"
    assert_same(on_mesh(config, zero=stage), plain, tied=models.tied(config.model))


def test_copies_stay_equal_where_shards_are_uneven() -> None:
    """A vocabulary that 2 does not divide: a copied position embedding once drifted apart in its last bits (dp 4, tp 2, bf16)."""
    config = config_of(**MODELS["gpt2-tied"], dp=4, tp=2, precision="bf16")
    assert config.model.vocab == 67
    on_mesh(config, zero=2, steps=4)  # raises where ranks that should hold copies do not
