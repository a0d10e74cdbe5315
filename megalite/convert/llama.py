"""Llama as transformers has it (LlamaForCausalLM), Mistral, which has the same tensors, and Qwen2, which has biases of query, key and
value: settings and names, both ways.

Rotary halves are laid out alike on both sides, so weights are copied and never permuted.
"""

from __future__ import annotations

from typing import Any

from megalite.config import Model
from megalite.convert.mapping import Source, Table, both, ending, require
from megalite.errors import UserError

PREFIX = "model."
MODEL_TYPES = ("llama", "mistral", "qwen2")


def fits(model: Model) -> bool:
    """Whether transformers can say this model as a Llama or a Qwen2."""
    kind = (model.family, model.positions, model.norm, model.activation)
    return kind == ("gpt", "rope", "rms", "swiglu") and model.has_qkv_bias in (model.bias, True)


def architecture(model: Model) -> str:
    return ("Qwen2" if _is_qwen(model) else "Llama") + ending(model, pretrained="ForCausalLM")


def _is_qwen(model: Model) -> bool:
    return model.has_qkv_bias and not model.bias


def read_config(config: Any) -> Model:
    """Our settings of a LlamaConfig, MistralConfig or Qwen2Config. Raises UserError for what ours cannot be."""
    require(config, hidden_act="silu", head_dim=(None, config.hidden_size // config.num_attention_heads))
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise UserError(
            f"{config.model_type}: rope_type = {rope['rope_type']!r}, but megalite rotates plainly ('default'); "
            "such a model cannot be imported"
        )
    bias = getattr(config, "attention_bias", False)
    require(config, mlp_bias=bias or (None, False))
    window = getattr(config, "sliding_window", None)  # within the window a Mistral is a Llama
    return Model(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        sequence=min(config.max_position_embeddings, window or config.max_position_embeddings),
        positions="rope",
        rope_base=rope["rope_theta"],
        norm="rms",
        norm_eps=config.rms_norm_eps,
        activation="swiglu",
        bias=bias,
        qkv_bias=True if config.model_type == "qwen2" else None,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        attention_dropout=config.attention_dropout,
    )


def write_config(model: Model) -> dict[str, Any]:
    """Settings of a LlamaConfig or a Qwen2Config; neither has a dropout but that of attention, ours may have been trained with one."""
    qwen = _is_qwen(model)
    return {
        "model_type": "qwen2" if qwen else "llama",
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.sequence,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": model.attention_dropout,
        **({} if qwen else {"head_dim": model.head_width, "attention_bias": model.bias, "mlp_bias": model.bias}),
    }


def table(model: Model) -> Table:
    """Our name -> theirs."""
    key, f = model.num_kv_heads * model.head_width, model.mlp_width
    found: Table = {
        "embed.token.weight": Source(("model.embed_tokens.weight",)),
        "head.norm.weight": Source(("model.norm.weight",)),
    }
    for n in range(model.layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        projections = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        found |= both(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False)
        found |= both(f"{ours}.attention.qkv", projections, sizes=(model.width, key, key), bias=model.has_qkv_bias)
        found |= both(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", bias=model.bias)
        found |= both(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=False)
        found |= both(f"{ours}.mlp.up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"), sizes=(f, f), bias=model.bias)
        found |= both(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", bias=model.bias)
    if model.head != "pretrain":
        return found | both("head.classify", "score", bias=model.head == "tag")
    if not model.tied:
        found["head.project.weight"] = Source(("lm_head.weight",))
    return found
