"""Counts against the models themselves, PyTorch's own FLOP counter and the published formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalite import models
from megalite.config import Model
from megalite.models import counts

SMALL = {"layers": 3, "width": 48, "heads": 6, "vocab": 211, "sequence": 40}
LLAMA = {**SMALL, "kv_heads": 2, "mlp": 100, "positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False}
MODELS = {
    "gpt2": Model(**SMALL),
    "gpt2 untied, no biases": Model(**SMALL, tied=False, bias=False),
    "llama": Model(**LLAMA, tied=False),
    "llama tied": Model(**LLAMA),
    "qwen": Model(**LLAMA, qkv_bias=True),
    "bert": Model(**SMALL, family="bert", activation="gelu"),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def batch(model: Model, size: int, sequence: int) -> models.Batch:
    assert model.vocab is not None
    ids = torch.randint(0, model.vocab, (size, sequence), generator=torch.Generator().manual_seed(0))
    return {
        "ids": ids,
        "labels": ids,
        "weights": torch.full(ids.shape, 1 / ids.numel()),
        "segments": torch.zeros_like(ids),
        "length": torch.full((ids.shape[0],), ids.shape[1]),
        "next_sentence": torch.zeros(size, dtype=torch.long),
        "pair_weights": torch.full((size,), 1 / size),
    }


@every_model
def test_the_count_of_parameters_is_that_of_the_model(model: Model) -> None:
    whole = models.build(model, seed=1, device="meta")
    assert counts.num_parameters(model) == sum(p.numel() for p in whole.parameters())


@every_model
def test_a_step_costs_what_pytorch_counts(model: Model) -> None:
    """Attention runs as plain products here: PyTorch counts nothing for its fused CPU kernel, and 2.5 instead of 2 forward passes for a
    fused backward, which recomputes the scores."""
    whole = models.build(model, seed=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        whole(batch(model, 3, 32)).sum().backward()
    assert counts.step_flops(model, 32, 3) == pytest.approx(counter.get_total_flops(), rel=0.02)


@every_model
def test_every_layer_costs_what_pytorch_counts(model: Model) -> None:
    whole, inputs = models.build(model, seed=1), batch(model, 1, 24)
    costs, x = counts.layer_costs(model, 24), inputs["ids"]
    assert len(costs) == len(models.layers(model))
    for (name, _), cost in zip(models.layers(model), costs, strict=True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            x = whole.get_submodule(name)(x, inputs)
        assert cost == pytest.approx(counter.get_total_flops(), rel=0.02), name


def test_a_gpt_step_costs_what_the_megatron_paper_says() -> None:
    """Narayanan et al. 2021, without recomputation: 72 b s l d^2 (1 + s / 6d + v / 12ld)."""
    model = Model(layers=24, width=2048, heads=16, vocab=51200, sequence=2048)
    b, s, layers, d, v = 512, 2048, 24, 2048, 51200
    formula = 72 * b * s * layers * d**2 * (1 + s / (6 * d) + v / (12 * layers * d))
    assert counts.step_flops(model, s, b) == pytest.approx(formula, rel=1e-12)


def test_a_gpt_token_costs_what_the_palm_paper_says() -> None:
    """Chowdhery et al. 2022, appendix B: 6N + 12 l h k s, N without what is only looked up or added."""
    model = Model(**{**LLAMA, "kv_heads": None}, tied=False)
    s, looked_up, norms = 40, 211 * 48, (2 * 3 + 1) * 48
    a_token = 6 * (counts.num_parameters(model) - looked_up - norms) + 12 * model.layers * model.heads * model.head_width * s
    assert counts.step_flops(model, s, 1) / s == pytest.approx(a_token, rel=1e-12)


def test_twice_the_sequences_cost_twice_and_a_longer_one_costs_more_than_its_length() -> None:
    model = MODELS["llama"]
    assert counts.step_flops(model, 32, 6) == 2 * counts.step_flops(model, 32, 3)
    assert counts.step_flops(model, 64, 3) > 2 * counts.step_flops(model, 32, 3)
