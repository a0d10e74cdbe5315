"""GPT-2 as transformers has it (GPT2LMHeadModel): settings and names, both ways. Its linear layers hold (in, out)."""

from __future__ import annotations

from typing import Any

from megalite.config import Model
from megalite.convert.mapping import Source, Table, both, ending, require

PREFIX = "transformer."
MODEL_TYPES = ("gpt2",)
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def fits(model: Model) -> bool:
    """Whether transformers can say this model as a GPT-2."""
    kind = (model.family, model.positions, model.norm, model.bias, model.has_qkv_bias, model.num_kv_heads)
    return kind == ("gpt", "learned", "layer", True, True, model.heads) and model.activation in ACTIVATIONS.values()


def architecture(model: Model) -> str:
    return "GPT2" + ending(model, pretrained="LMHeadModel")


def read_config(config: Any) -> Model:
    """Our settings of a GPT2Config. Raises UserError for what ours cannot be."""
    require(config, activation_function=tuple(ACTIVATIONS), scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    require(config, add_cross_attention=False, embd_pdrop=config.resid_pdrop)
    return Model(
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        mlp=config.n_inner,
        vocab=config.vocab_size,
        sequence=config.n_positions,
        norm_eps=config.layer_norm_epsilon,
        activation=ACTIVATIONS[config.activation_function],  # type: ignore[arg-type]
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
    )


def write_config(model: Model) -> dict[str, Any]:
    """Settings of a GPT2Config."""
    return {
        "model_type": "gpt2",
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_inner": model.mlp_width,
        "n_positions": model.sequence,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == model.activation),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
    }


def table(model: Model) -> Table:
    """Our name -> theirs."""
    found: Table = {
        "embed.token.weight": Source(("transformer.wte.weight",)),
        "embed.position.weight": Source(("transformer.wpe.weight",)),
        **both("head.norm", "transformer.ln_f"),
    }
    for n in range(model.layers):
        ours, theirs = f"layers.{n}", f"transformer.h.{n}"
        found |= both(f"{ours}.attention_norm", f"{theirs}.ln_1") | both(f"{ours}.mlp_norm", f"{theirs}.ln_2")
        found |= both(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transposed=True)
        found |= both(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transposed=True)
        found |= both(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", transposed=True)
        found |= both(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", transposed=True)
    if model.head != "pretrain":
        found |= both("head.classify", "classifier") if model.head == "tag" else both("head.classify", "score", bias=False)
        return found
    if not model.tied:
        found["head.project.weight"] = Source(("lm_head.weight",))
    return found
