"""BERT as transformers has it (BertForPreTraining): settings and names, both ways."""

from __future__ import annotations

from typing import Any

from megalite.config import Model
from megalite.convert.mapping import Source, Table, both, ending, require

PREFIX = "bert."
MODEL_TYPES = ("bert",)


def fits(model: Model) -> bool:
    """Whether transformers can say this model as a BERT: it has one activation for blocks and head, and ours has plain GELU in the head."""
    return (model.family, model.activation, model.num_kv_heads) == ("bert", "gelu", model.heads)


def architecture(model: Model) -> str:
    return "Bert" + ending(model, pretrained="ForPreTraining")


def read_config(config: Any) -> Model:
    """Our settings of a BertConfig. Raises UserError for what ours cannot be."""
    require(config, hidden_act="gelu", type_vocab_size=2, is_decoder=False, tie_word_embeddings=True)
    return Model(
        family="bert",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        sequence=config.max_position_embeddings,
        norm_eps=config.layer_norm_eps,
        activation="gelu",
        init_std=config.initializer_range,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
    )


def write_config(model: Model) -> dict[str, Any]:
    """Settings of a BertConfig."""
    return {
        "model_type": "bert",
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.sequence,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "type_vocab_size": 2,
    }


def table(model: Model) -> Table:
    """Our name -> theirs."""
    embeddings = "bert.embeddings"
    found: Table = {
        "embed.token.weight": Source((f"{embeddings}.word_embeddings.weight",)),
        "embed.position.weight": Source((f"{embeddings}.position_embeddings.weight",)),
        "embed.segment.weight": Source((f"{embeddings}.token_type_embeddings.weight",)),
        **both("embed.norm", f"{embeddings}.LayerNorm"),
    }
    for n in range(model.layers):
        ours, theirs = f"layers.{n}", f"bert.encoder.layer.{n}"
        projections = tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
        found |= both(f"{ours}.attention.qkv", projections, sizes=(model.width,) * 3)
        found |= both(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        found |= both(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        found |= both(f"{ours}.mlp.up", f"{theirs}.intermediate.dense") | both(f"{ours}.mlp.down", f"{theirs}.output.dense")
        found |= both(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")
    if model.head != "pretrain":
        found |= both("head.pool", "bert.pooler.dense") if model.head != "tag" else {}
        return found | both("head.classify", "classifier")
    found |= both("head.transform", "cls.predictions.transform.dense") | both("head.norm", "cls.predictions.transform.LayerNorm")
    found["head.project.bias"] = Source(("cls.predictions.bias",))
    return found | both("head.pool", "bert.pooler.dense") | both("head.next_sentence", "cls.seq_relationship")
