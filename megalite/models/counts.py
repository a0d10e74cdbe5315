"""How much a model is: parameters, and floating point operations of a forward pass and of an optimizer step. Plain arithmetic, no torch.

In: `config.Model` with its vocabulary known.  Out: numbers that pipeline stages are balanced by and that MFU is measured against.
Symbols as everywhere: s sequence, d width, h query heads, g key-value heads, k head width, f MLP width, v vocabulary.

What counts as a FLOP: the matrix products that the model's equations ask for, m x n by n x k as 2mnk; norms, activations, softmax and the
embedding's look-up count nothing; a recomputed activation is not counted again, so the share of the peak reached is MFU, not HFU.
Attention counts all s x s scores, in a causal model too: the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B:
6N + 12 l h k s a token) and of Megatron-LM (Narayanan et al. 2021, arXiv:2104.04473, appendix: without recomputation
72 b s l d^2 (1 + s/6d + v/12ld)), so an MFU from here stands beside theirs, nanoGPT's and torchtitan's. A causal kernel does about half
of the attention's share (benchmarks of kernels alone count that half: FlashAttention-2, arXiv:2307.08691, section 4.1).
"""

from __future__ import annotations

from megalite.config import Model


def num_parameters(model: Model) -> int:
    """Parameters of the whole model, a tied weight counted once."""
    d, f, v = model.width, model.mlp_width, _vocab(model)
    norm = d if model.norm == "rms" else 2 * d
    heads = (model.heads + 2 * model.num_kv_heads) * model.head_width  # columns of the fused query, key and value
    up = f * (2 if model.activation == "swiglu" else 1)
    block = d * heads + d * d + d * up + f * d + 2 * norm
    if model.has_qkv_bias:
        block += heads
    if model.bias:
        block += d + up + d
    embed = v * d + (model.sequence * d if model.positions == "learned" else 0)
    head = norm if model.tied else norm + v * d
    if model.family == "bert":
        embed += 2 * d + norm  # segments
        head += v + 2 * (d * d + d) + 2 * d + 2  # bias of the projection; transform and pool; next sentence
    if model.head != "pretrain":
        bert, tag = model.family == "bert", model.head == "tag"
        head = (0 if bert else norm) + (d * d + d if bert and not tag else 0) + model.labels * (d + (bert or tag))
    return embed + model.layers * block + head


def layer_costs(model: Model, sequence: int) -> list[float]:
    """Forward FLOPs of every layer for one sequence, in the order of `models.layers`: embed, blocks, head.

    embed       0, a look-up
    block       2 s d (h + 2g) k + 4 s^2 h k + 2 s h k d + 4 s d f      (6 s d f with SwiGLU)
    GPT head    2 s d v
    BERT head   2 s d v + 2 s d^2 + 2 d^2 + 4 d   every position is projected, masked or not; transform, pool, next sentence
    task head   2 s d n for a tag, 2 d n for a sample, and 2 d^2 for BERT's pool
    """
    s, d, f, k = sequence, model.width, model.mlp_width, model.head_width
    projections = 2 * s * d * (model.heads + 2 * model.num_kv_heads) * k + 2 * s * model.heads * k * d
    attention = 4 * s * s * model.heads * k  # scores, and values mixed by them
    mlp = (6 if model.activation == "swiglu" else 4) * s * d * f
    head = 2 * s * d * _vocab(model)
    if model.family == "bert":
        head += 2 * s * d * d + 2 * d * d + 4 * d
    if model.head != "pretrain":
        pool = 2 * d * d if model.family == "bert" and model.head != "tag" else 0
        head = pool + 2 * d * model.labels * (s if model.head == "tag" else 1)
    return [0.0, *[float(projections + attention + mlp)] * model.layers, float(head)]


def step_flops(model: Model, sequence: int, num_sequences: int) -> float:
    """Model FLOPs of one optimizer step over `num_sequences` sequences: the forward pass, and a backward pass of twice as much.

    A product y = x w goes forward once; backward it makes dx = dy w^T and dw = x^T dy, each as large.
    """
    return 3.0 * num_sequences * sum(layer_costs(model, sequence))


def _vocab(model: Model) -> int:
    assert model.vocab is not None, "the vocabulary is known once the tokenizer is"
    return model.vocab
