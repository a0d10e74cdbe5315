"""Our models against transformers' on the same random weights: logits, losses, gradients. Nothing is downloaded.

The weights are copied here by name, without `megalite.convert`, so that the two check each other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megalite import models
from megalite.config import Model

SIZE, SEQUENCE, VOCAB = 3, 21, 101


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def disturb(theirs: nn.Module) -> None:
    """Random values on top of the initial ones, so that no bias is 0 and no norm is 1."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    theirs.eval()


def load(model: Model, weights: dict[str, Tensor]) -> models.Whole:
    whole = models.build(model, seed=1)
    whole.load_state_dict(weights, strict=True)
    return whole


def tokens(seed: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (SIZE, SEQUENCE), generator=torch.Generator().manual_seed(seed))


def with_labels(ids: Tensor, labels: Tensor) -> models.Batch:
    """The batch whose loss is the mean over all labels that are not -100."""
    real = labels != -100
    return {"ids": ids, "labels": labels, "weights": real / real.sum()}


def next_tokens(ids: Tensor) -> Tensor:
    """Labels as transformers shifts them: the next token, and none after the last."""
    return torch.cat([ids[:, 1:], torch.full((SIZE, 1), -100)], dim=1)


def gpt2() -> tuple[models.Whole, GPT2LMHeadModel]:
    model = Model(layers=3, width=60, heads=4, mlp=140, vocab=VOCAB, sequence=32)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=60, n_layer=3, n_head=4, n_inner=140))
    disturb(theirs)
    source = theirs.state_dict()
    weights = {
        "embed.token.weight": source["transformer.wte.weight"],
        "embed.position.weight": source["transformer.wpe.weight"],
        "head.norm.weight": source["transformer.ln_f.weight"],
        "head.norm.bias": source["transformer.ln_f.bias"],
        "head.project.weight": source["lm_head.weight"],
    }
    names = {"ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out"}
    names |= {"ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    for n in range(model.layers):
        for their_name, our_name in names.items():
            weight = source[f"transformer.h.{n}.{their_name}.weight"]
            weights[f"layers.{n}.{our_name}.weight"] = weight.T if weight.dim() == 2 else weight  # their Conv1D holds (in, out)
            weights[f"layers.{n}.{our_name}.bias"] = source[f"transformer.h.{n}.{their_name}.bias"]
    return load(model, weights), theirs


def llama(*, heads: int, kv_heads: int, tied: bool) -> tuple[models.Whole, LlamaForCausalLM]:
    model = Model(
        layers=3, width=54, heads=heads, kv_heads=kv_heads, mlp=131, vocab=VOCAB, sequence=32, tied=tied, bias=False,
        positions="rope", rope_base=500.0, norm="rms", norm_eps=1e-4, activation="swiglu",
    )  # fmt: skip
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=54, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=131, max_position_embeddings=32, rms_norm_eps=1e-4, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs = LlamaForCausalLM(shape)
    disturb(theirs)
    source = theirs.state_dict()
    weights = {
        "embed.token.weight": source["model.embed_tokens.weight"],
        "head.norm.weight": source["model.norm.weight"],
        "head.project.weight": source["lm_head.weight"],
    }
    for n in range(model.layers):
        theirs_at, ours_at = f"model.layers.{n}", f"layers.{n}"
        weights |= {
            f"{ours_at}.attention.qkv.weight": torch.cat([source[f"{theirs_at}.self_attn.{part}_proj.weight"] for part in "qkv"]),
            f"{ours_at}.attention.out.weight": source[f"{theirs_at}.self_attn.o_proj.weight"],
            f"{ours_at}.mlp.up.weight": torch.cat([source[f"{theirs_at}.mlp.{part}_proj.weight"] for part in ("gate", "up")]),
            f"{ours_at}.mlp.down.weight": source[f"{theirs_at}.mlp.down_proj.weight"],
            f"{ours_at}.attention_norm.weight": source[f"{theirs_at}.input_layernorm.weight"],
            f"{ours_at}.mlp_norm.weight": source[f"{theirs_at}.post_attention_layernorm.weight"],
        }
    return load(model, weights), theirs


def bert() -> tuple[models.Whole, BertForPreTraining]:
    model = Model(family="bert", layers=3, width=60, heads=4, mlp=140, vocab=VOCAB, sequence=32, activation="gelu", norm_eps=1e-12)
    theirs = BertForPreTraining(
        BertConfig(
            vocab_size=VOCAB, hidden_size=60, num_hidden_layers=3, num_attention_heads=4, intermediate_size=140, max_position_embeddings=32
        )
    )
    disturb(theirs)
    source = theirs.state_dict()
    names = {
        "embed.norm": "bert.embeddings.LayerNorm",
        "head.transform": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.project": "cls.predictions.decoder",
        "head.pool": "bert.pooler.dense",
        "head.next_sentence": "cls.seq_relationship",
    }
    weights = {
        "embed.token.weight": source["bert.embeddings.word_embeddings.weight"],
        "embed.position.weight": source["bert.embeddings.position_embeddings.weight"],
        "embed.segment.weight": source["bert.embeddings.token_type_embeddings.weight"],
    }
    for n in range(model.layers):
        at = f"bert.encoder.layer.{n}"
        names |= {
            f"layers.{n}.attention.out": f"{at}.attention.output.dense",
            f"layers.{n}.attention_norm": f"{at}.attention.output.LayerNorm",
            f"layers.{n}.mlp.up": f"{at}.intermediate.dense",
            f"layers.{n}.mlp.down": f"{at}.output.dense",
            f"layers.{n}.mlp_norm": f"{at}.output.LayerNorm",
        }
        for leaf in ("weight", "bias"):
            parts = [source[f"{at}.attention.self.{part}.{leaf}"] for part in ("query", "key", "value")]
            weights[f"layers.{n}.attention.qkv.{leaf}"] = torch.cat(parts)
    weights |= {f"{our_name}.{leaf}": source[f"{name}.{leaf}"] for our_name, name in names.items() for leaf in ("weight", "bias")}
    return load(model, weights), theirs


GPTS = {
    "gpt2": gpt2,
    "llama, grouped heads": lambda: llama(heads=9, kv_heads=3, tied=False),
    "llama, one key head": lambda: llama(heads=3, kv_heads=1, tied=True),
    "llama, as many key heads": lambda: llama(heads=3, kv_heads=3, tied=False),
}
every_gpt = pytest.mark.parametrize("make", GPTS.values(), ids=GPTS.keys())


@every_gpt
def test_a_gpt_gives_the_logits_of_transformers(make) -> None:
    ours, theirs = make()
    ids = tokens()
    with torch.no_grad():
        same(ours.get_submodule("head").logits(ours.hidden({"ids": ids})), theirs(ids).logits)


@every_gpt
def test_a_gpt_gives_the_loss_and_gradients_of_transformers(make) -> None:
    ours, theirs = make()
    ids = tokens()
    loss, expected = ours(with_labels(ids, next_tokens(ids))).sum(), theirs(ids, labels=ids).loss
    same(loss, expected)
    loss.backward()
    expected.backward()
    same(ours.get_parameter("embed.token.weight").grad, theirs.get_input_embeddings().weight.grad)  # type: ignore[arg-type]


def bert_batch() -> tuple[models.Batch, dict[str, Tensor]]:
    """Sentence pairs of different lengths, as our batch and as transformers' arguments."""
    ids, lengths = tokens(), torch.tensor([SEQUENCE, 12, 5])
    real = torch.arange(SEQUENCE) < lengths[:, None]
    segments = (torch.arange(SEQUENCE) >= lengths[:, None] // 2).long() * real
    masked = real & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.3)
    labels, follows = tokens(seed=4).masked_fill(~masked, -100), torch.tensor([0, 1, 1])
    ours = {**with_labels(ids, labels), "segments": segments, "length": lengths}
    ours |= {"next_sentence": follows, "pair_weights": torch.full((SIZE,), 1 / SIZE)}
    theirs = {"input_ids": ids, "token_type_ids": segments, "attention_mask": real.long(), "labels": labels, "next_sentence_label": follows}
    return ours, theirs


def test_bert_gives_the_logits_of_transformers_wherever_there_is_a_token() -> None:
    ours, theirs = bert()
    batch, arguments = bert_batch()
    with torch.no_grad():
        hidden, expected = ours.hidden(batch), theirs(**arguments)
        real = arguments["attention_mask"].bool()
        same(ours.get_submodule("head").logits(hidden)[real], expected.prediction_logits[real])
        same(ours.get_submodule("head").pair_logits(hidden), expected.seq_relationship_logits)


def test_bert_gives_the_loss_and_gradients_of_transformers() -> None:
    ours, theirs = bert()
    batch, arguments = bert_batch()
    loss, expected = ours(batch).sum(), theirs(**arguments).loss
    same(loss, expected)
    loss.backward()
    expected.backward()
    same(ours.get_parameter("embed.token.weight").grad, theirs.get_input_embeddings().weight.grad)  # type: ignore[arg-type]
    same(ours.get_parameter("head.pool.weight").grad, theirs.bert.pooler.dense.weight.grad)  # type: ignore[arg-type]
