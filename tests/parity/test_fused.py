"""Document masks and what is fused: every mesh computes what one process of plain PyTorch computes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from compare import assert_same, config_of, on_mesh, reference

from megalite import models
from megalite.config import Config
from megalite.tune import parity
from megalite.tune.verify import STEPS

MODELS = {"gpt2": {"style": "gpt2"}, "llama": {"style": "llama", "tied": False}, "bert": {"family": "bert"}}
MESHES: dict[str, tuple[dict[str, Any], int]] = {
    "dp2": ({"dp": 2}, 3),
    "pp2": ({"pp": 2, "recompute": "full"}, 2),
    "cp2-tp2": ({"cp": 2, "tp": 2}, 0),
    "cp2-pp2": ({"cp": 2, "pp": 2, "recompute": "selective"}, 3),
    "pp2-tp2-split": ({"pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "interleaved"}, 3),
    "dp2-cp2-pp2": ({"dp": 2, "cp": 2, "pp": 2}, 1),
}


def _config(model: str, mesh: str = "", *, document_mask: bool = False, dropout: float = 0.0, **train: Any) -> Config:
    settings = MESHES[mesh][0] if mesh else {}
    batch = {"micro_batch": 2 if "dp" in settings else 4}  # four microbatches a step
    config = config_of(**MODELS[model], **{"layers": 4, **batch, **settings, **train})
    shape = config.model.model_copy(update={"attention_dropout": dropout, "dropout": dropout / 2})
    return config.model_copy(update={"model": shape, "data": config.data.model_copy(update={"document_mask": document_mask})})


@functools.cache
def _plain(model: str, document_mask: bool, dropout: float = 0.0) -> list[Any]:
    return reference(_config(model, document_mask=document_mask, dropout=dropout))


def _use_the_kernels() -> None:
    """On this rank attention and dropout run as on a GPU, with plain PyTorch for the kernels; a layer that builds a mask fails."""
    import importlib

    from megalite_kernels import attention as fused  # pyright: ignore[reportMissingImports]
    from megalite_kernels import drop, randomness  # pyright: ignore[reportMissingImports]

    dropping = importlib.import_module("megalite_kernels.dropout")
    dropping._why_not = lambda *_: None

    def run(x: Any, samples: Any, places: Any, residual: Any, *, site: int, dropped: int, scale: float) -> Any:
        left = dropping.drop(x, randomness.streams(samples[:, None], places, site=site), dropped)
        return left if residual is None else residual + left

    drop.run = run
    drop.run_draw = lambda samples, heads, length, site: torch.stack([*randomness.sides(samples, heads, length, site=site)])

    from megalite.models import attention

    build, ready = attention.with_spans, attention._spans

    def once(batch: Any, **kwargs: Any) -> Any:
        attention._spans = ready
        try:
            return build(batch, **kwargs)
        finally:
            attention._spans = _refuse

    import megalite.engine

    megalite.engine.with_spans = once
    attention._spans = _refuse
    attention.is_fused = lambda q, dropout=False: True
    attention.attention = functools.partial(fused, impl="reference")


def _refuse(*, lengths: Any, documents: Any, **_: Any) -> None:
    assert lengths is None and documents is None, "a layer built the mask of its batch again"


def test_a_document_mask_changes_what_is_computed() -> None:
    masked, whole = _plain("gpt2", True), _plain("gpt2", False)
    assert abs(masked[0].loss - whole[0].loss) > 1e-3


def _in_turn(models: tuple[str, ...]) -> list[Any]:
    """Three meshes with one of the models in turn; the others are slow."""
    often = {(mesh, models[place % len(models)]) for place, mesh in enumerate(("dp2", "cp2-pp2", "pp2-tp2-split"))}
    pairs = [(mesh, model) for mesh in MESHES for model in models]
    return [pytest.param(*pair, marks=() if pair in often else (pytest.mark.slow,)) for pair in pairs]


@pytest.mark.parametrize(("mesh", "model"), _in_turn(("gpt2", "llama")))
def test_documents_are_kept_apart_on_every_mesh(mesh: str, model: str) -> None:
    config = _config(model, mesh, document_mask=True)
    assert_same(on_mesh(config, zero=MESHES[mesh][1]), _plain(model, True), tied=models.tied(config.model))


@pytest.mark.parametrize(
    ("mesh", "model", "dropout", "train"),
    [
        ("cp2-pp2", "gpt2", 0.2, {}),
        ("dp2", "bert", 0.0, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("pp2-tp2-split", "llama", 0.2, {}),
                ("pp2-tp2-split", "llama", 0.2, {"schedule": "zerobubble", "recompute": "selective"}),
                ("cp2-pp2", "bert", 0.2, {"schedule": "zerobubble", "recompute": "full"}),
            )
        ),
    ],
)
def test_what_is_fused_computes_what_pytorch_does_with_masks_built_once_a_batch(
    mesh: str, model: str, dropout: float, train: dict[str, Any]
) -> None:
    config, stage = _config(model, mesh, document_mask=model != "bert", dropout=dropout, **train), MESHES[mesh][1]
    document = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    ours = parity.assemble(parity.on_mesh(config, document, steps=STEPS, plant=_use_the_kernels), steps=STEPS)
    assert_same(ours, _plain(model, model != "bert", dropout), tied=models.tied(config.model))


@pytest.mark.parametrize(("mesh", "model"), _in_turn(("bert", "gpt2", "llama")))
def test_a_loss_in_pieces_of_the_vocabulary_is_the_same(mesh: str, model: str) -> None:
    """Five pieces of a rank's 67 words, or of its 34 or 33."""
    config = _config(model, mesh, loss_pieces=5)
    assert_same(on_mesh(config, zero=MESHES[mesh][1]), _plain(model, False), tied=models.tied(config.model))
