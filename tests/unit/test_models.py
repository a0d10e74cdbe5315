"""What a model promises: weights by name, causality, padding, one weight for both ends of a tie, losses that add up."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalite import models
from megalite.config import Model
from megalite.models.attention import attend, rotate
from megalite.models.layers import TokenLoss

SMALL = {"layers": 3, "width": 48, "heads": 6, "vocab": 97, "sequence": 24}
LLAMA = {**SMALL, "kv_heads": 2, "mlp": 70, "positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False, "tied": False}
GPT2_STYLE, LLAMA_STYLE = Model(**SMALL), Model(**LLAMA)
BERT = Model(**SMALL, family="bert", activation="gelu")
every_gpt = pytest.mark.parametrize("model", [GPT2_STYLE, LLAMA_STYLE], ids=["gpt2", "llama"])
every_model = pytest.mark.parametrize("model", [GPT2_STYLE, LLAMA_STYLE, BERT], ids=["gpt2", "llama", "bert"])


def weights(model: Model, seed: int = 1) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in models.build(model, seed=seed).named_parameters()}


def batch(model: Model, *, size: int = 4, sequence: int = 17, seed: int = 0) -> models.Batch:
    draw = torch.Generator().manual_seed(seed)
    assert model.vocab is not None
    return {
        "ids": torch.randint(0, model.vocab, (size, sequence), generator=draw),
        "labels": torch.randint(0, model.vocab, (size, sequence), generator=draw),
        "weights": torch.rand((size, sequence), generator=draw),
        "segments": torch.randint(0, 2, (size, sequence), generator=draw),
        "length": torch.full((size,), sequence),
        "next_sentence": torch.randint(0, 2, (size,), generator=draw),
        "pair_weights": torch.rand((size,), generator=draw),
    }


def logits(whole: models.Whole, inputs: models.Batch) -> Tensor:
    with torch.no_grad():
        return whole.get_submodule("head").logits(whole.hidden(inputs))


# ---- initial weights -------------------------------------------------------------------------------------------------------------------


@every_model
def test_the_random_state_around_a_build_changes_no_weight(model: Model) -> None:
    torch.manual_seed(5)
    first = weights(model)
    torch.manual_seed(6)
    assert all(torch.equal(first[name], weight) for name, weight in weights(model).items())


@every_model
def test_a_weight_drawn_alone_is_the_one_in_the_whole_model(model: Model) -> None:
    for name, weight in reversed(weights(model, seed=9).items()):
        assert torch.equal(models.draw(name, tuple(weight.shape), model=model, seed=9), weight), name


@every_model
def test_every_name_and_every_seed_has_its_own_matrix(model: Model) -> None:
    drawn = [weight.flatten()[:64] for seed in (1, 2) for weight in weights(model, seed).values() if weight.dim() > 1]
    assert len({tuple(start.tolist()) for start in drawn}) == len(drawn)


@every_model
def test_more_layers_leave_the_weights_below_as_they_are_but_for_the_scale_of_the_residual(model: Model) -> None:
    few, many = weights(model), weights(model.model_copy(update={"layers": 12}))
    for name, weight in few.items():
        residual = model.family == "gpt" and name.endswith(("attention.out.weight", "mlp.down.weight"))
        torch.testing.assert_close(many[name] * (math.sqrt(12 / model.layers) if residual else 1), weight, rtol=1e-6, atol=0)


def test_matrices_have_the_spread_of_gpt_2_norms_start_at_1_and_biases_at_0() -> None:
    for name, weight in weights(Model(layers=8, width=256, heads=4, vocab=997, sequence=64)).items():
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            spread = 0.02 / math.sqrt(16) if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert weight.std().item() == pytest.approx(spread, rel=0.02) and abs(weight.mean().item()) < spread / 20, name


def test_bf16_weights_are_the_fp32_ones_rounded() -> None:
    exact = models.build(GPT2_STYLE, seed=3)
    for name, weight in models.build(GPT2_STYLE, seed=3, dtype=torch.bfloat16).named_parameters():
        assert torch.equal(weight, exact.get_parameter(name).bfloat16()), name


# ---- structure -------------------------------------------------------------------------------------------------------------------------


@every_model
def test_a_model_is_embed_then_blocks_then_head(model: Model) -> None:
    assert [name for name, _ in models.layers(model)] == ["embed", "layers.0", "layers.1", "layers.2", "head"]


@every_model
def test_the_plan_names_modules_that_exist(model: Model) -> None:
    found = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in models.build(model, seed=1, device="meta").named_modules()}
    assert models.plan(model).keys() <= found


@every_model
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_head_is_the_very_embedding_and_an_untied_one_is_not(model: Model, device: str) -> None:
    whole = models.build(model, seed=1, device=device)
    assert (whole.get_submodule("head.project").weight is whole.get_submodule("embed.token").weight) == model.tied


def test_both_ends_of_a_tie_add_to_one_gradient() -> None:
    tied, inputs = models.build(GPT2_STYLE, seed=1), batch(GPT2_STYLE)
    free = models.build(GPT2_STYLE.model_copy(update={"tied": False}), seed=1)
    free.load_state_dict(tied.state_dict())
    for whole in (tied, free):
        whole(inputs).sum().backward()
    ends = [free.get_parameter(f"{name}.weight").grad for name in ("embed.token", "head.project")]
    assert all(end is not None and end.any() for end in ends)
    torch.testing.assert_close(tied.get_parameter("embed.token.weight").grad, ends[0] + ends[1])  # type: ignore[operator]


@every_model
def test_every_parameter_gets_a_gradient(model: Model) -> None:
    whole = models.build(model, seed=1)
    whole(batch(model, sequence=model.sequence)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in whole.named_parameters())


# ---- attention -------------------------------------------------------------------------------------------------------------------------


@every_gpt
@pytest.mark.parametrize("position", [0, 7, 16])
def test_a_gpt_does_not_see_the_future(model: Model, position: int) -> None:
    whole, inputs = models.build(model, seed=1), batch(model)
    before = logits(whole, inputs)
    changed = inputs["ids"].clone()
    changed[:, position] = (changed[:, position] + 1) % 97
    after = logits(whole, {**inputs, "ids": changed})
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all(), "a GPT sees the past and the present"


def test_bert_sees_both_ways() -> None:
    whole, inputs = models.build(BERT, seed=1), batch(BERT)
    changed = inputs["ids"].clone()
    changed[:, 8] = (changed[:, 8] + 1) % 97
    assert (logits(whole, inputs) != logits(whole, {**inputs, "ids": changed})).any(-1).all()


@settings(deadline=None, max_examples=5)
@given(lengths=st.lists(st.integers(1, 17), min_size=4, max_size=4), padding=st.integers(0, 96))
def test_bert_does_not_see_padding(lengths: list[int], padding: int) -> None:
    whole, inputs = models.build(BERT, seed=1), batch(BERT)
    inputs["length"] = torch.tensor(lengths)
    real = torch.arange(17) < inputs["length"][:, None]
    padded = {**inputs, "ids": inputs["ids"].where(real, padding), "segments": inputs["segments"].where(real, 0)}
    torch.testing.assert_close(logits(whole, padded)[real], logits(whole, inputs)[real])
    for row, length in enumerate(lengths):
        alone = {name: inputs[name][row : row + 1, :length] for name in ("ids", "segments")} | {"length": torch.tensor([length])}
        torch.testing.assert_close(logits(whole, padded)[row, :length], logits(whole, alone)[0], rtol=1e-5, atol=1e-5)


def test_grouped_heads_are_whole_heads_with_repeated_keys_and_values() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 9, heads, 8), generator=draw) for heads in (6, 2, 2))
    repeated = attend(q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2), causal=True)
    torch.testing.assert_close(attend(q, k, v, causal=True), repeated)


@settings(deadline=None)
@given(shift=st.integers(0, 20), base=st.floats(10, 1e6))
def test_rotary_scores_depend_on_the_distance_alone(shift: int, base: float) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=draw)
    queries, keys = (rotate(x.expand(1, 32, 1, 8), base)[0, :, 0] for x in (q, k))
    scores = queries @ keys.T
    assert scores[5 + shift, 2 + shift].item() == pytest.approx(scores[5, 2].item(), abs=1e-4)
    assert scores[0, 0].item() == pytest.approx(torch.dot(q, k).item(), abs=1e-5)


@every_gpt
def test_a_short_sequence_gets_the_logits_it_has_at_the_start_of_a_long_one(model: Model) -> None:
    whole, inputs = models.build(model, seed=1), batch(model)
    torch.testing.assert_close(logits(whole, {"ids": inputs["ids"][:, :7]}), logits(whole, inputs)[:, :7], rtol=1e-5, atol=1e-5)


# ---- loss ------------------------------------------------------------------------------------------------------------------------------


@every_gpt
def test_packed_documents_get_the_logits_and_the_loss_they_have_alone(model: Model) -> None:
    whole, together = models.build(model, seed=1).double(), batch(model, size=2)
    lengths = torch.tensor([5, 1, 8, 3])
    together["documents"] = torch.repeat_interleave(torch.arange(4), lengths).expand(2, -1)
    packed = logits(whole, together)
    parts = together["ids"].split(lengths.tolist(), dim=1)
    alone = [logits(whole, {"ids": part}) for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
    together["weights"] = together["weights"].double()
    pieces = ({name: together[name].split(lengths.tolist(), dim=1)[n] for name in ("ids", "labels", "weights")} for n in range(4))
    torch.testing.assert_close(whole(together), torch.stack([whole(piece) for piece in pieces]).sum(0))


def test_weights_of_one_over_the_count_make_the_loss_a_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.randn((3, 5, 11), generator=draw), torch.randint(0, 11, (3, 5), generator=draw)
    mean = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(TokenLoss(11)(scores, labels, torch.full((3, 5), 1 / 15)), mean)


def test_a_position_of_weight_0_adds_nothing_whatever_its_label() -> None:
    scores, labels = torch.randn((1, 4, 11), generator=torch.Generator().manual_seed(0)), torch.tensor([[3, -100, 7, -1]])
    kept = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    expected = torch.nn.functional.cross_entropy(scores[0, [0, 2]], torch.tensor([3, 7]))
    torch.testing.assert_close(TokenLoss(11)(scores, labels, kept), expected)


@every_model
def test_the_losses_of_microbatches_add_up_to_that_of_the_batch(model: Model) -> None:
    whole, inputs = models.build(model, seed=1), batch(model)
    inputs["length"] = torch.tensor([17, 3, 9, 12])
    with torch.no_grad():
        parts = [whole({name: value[row : row + 1] for name, value in inputs.items()}) for row in range(4)]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole(inputs))


@every_model
def test_an_untrained_model_guesses(model: Model) -> None:
    whole, inputs = models.build(model, seed=1), batch(model)
    inputs["weights"], inputs["pair_weights"] = torch.full((4, 17), 1 / 68), torch.full((4,), 1 / 4)
    chance = [math.log(97), math.log(2)][: 2 if model.family == "bert" else 1]
    assert whole(inputs).tolist() == pytest.approx(chance, rel=0.05)
