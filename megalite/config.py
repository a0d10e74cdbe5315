"""The whole run as one frozen value: model, mesh, data, training, optimizer, logging, checkpoints.

In: a recipe's name or a YAML file, and command-line flags (default < file < flag).  Out: a `Config` that is consistent in
itself; what needs the number of ranks or the shards is checked by `fit.py` and by the data set. Nothing here
imports torch, so a wrong flag is answered in a second.

The run config owns batch sizes, precision, clipping, the optimizer and its schedule. The DeepSpeed JSON owns `zero_optimization`,
offload, communication and whatever else DeepSpeed offers (see `ds_config.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from megalite.errors import UserError
from megalite.runfile import explain, merge, read, recipes, suggest
from megalite.task import Task
from megalite.upkeep import Checkpoint, Log, Section, Watch

__all__ = ["Config", "Model", "Section", "explain", "load", "merge", "parse", "read", "recipes", "run_folder", "suggest"]

CHUNKED = {"interleaved": 2, "looped": 2, "zerobubble": 1}  # schedules under which a rank may hold several chunks of layers, and how many
V_SHAPED = ("zbv", "dualpipev")  # torch has them too
Share = Annotated[float, Field(ge=0, lt=1)]


class Run(Section):
    folder: str | None = None
    """Where everything this run writes goes; left out: runs/NAME."""
    seed: NonNegativeInt = 1234
    """Decides initial weights and the order of samples, in every layout alike."""


class Model(Section):
    family: Literal["gpt", "bert"] = "gpt"
    """gpt: causal language model; bert: masked language model with next-sentence head."""
    layers: PositiveInt = 12
    """Number of transformer blocks."""
    width: PositiveInt = 768
    """Width d of the hidden state."""
    heads: PositiveInt = 12
    """Query heads h; each is width / heads wide."""
    kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); left out: as many as heads."""
    mlp: PositiveInt | None = None
    """Width f of the MLP; left out: 4 x width."""
    vocab: PositiveInt | None = None
    """Vocabulary v; left out: that of the tokenizer the shards were made with."""
    sequence: PositiveInt = 1024
    """Longest sequence the model can read (learned positions end here)."""
    positions: Literal["learned", "rope"] = "learned"
    """learned: GPT-2 and BERT; rope: rotary embedding (Llama)."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm: Literal["layer", "rms"] = "layer"
    """layer: LayerNorm; rms: RMSNorm (Llama)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance inside every norm."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    """gelu: BERT; gelu_tanh: GPT-2; swiglu: gated (Llama)."""
    bias: bool = True
    """Biases in the linear layers."""
    qkv_bias: bool | None = None
    """Biases of query, key and value; left out: as bias. Qwen2 has these alone."""
    tied: bool = True
    """The head shares the token embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    dropout: Share = 0.0
    """Share of the elements dropped after the embedding and after attention and MLP of every block, in training."""
    attention_dropout: Share = 0.0
    """Share of the attention probabilities dropped, in training; without the fused kernels all s x s of them are in memory."""
    head: Literal["pretrain", "classify", "regress", "tag"] = "pretrain"
    """What the trunk ends in; `megalite finetune` sets it."""
    labels: PositiveInt = 1
    """Numbers a classify, regress or tag head puts out."""

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def mlp_width(self) -> int:
        return self.mlp or 4 * self.width

    def model_post_init(self, _: Any) -> None:
        if self.width % self.heads:
            raise UserError(f"model.width = {self.width} is not divisible by model.heads = {self.heads}; choose heads that divide it")
        if self.heads % self.num_kv_heads:
            raise UserError(
                f"model.heads = {self.heads} is not divisible by model.kv_heads = {self.kv_heads}; choose kv_heads that divide it"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise UserError(f"rotary positions need an even head width, but width / heads = {self.head_width}; choose other heads")
        bert = (self.positions, self.norm, self.bias, self.has_qkv_bias, self.tied)
        if self.family == "bert" and bert != ("learned", "layer", True, True, True):
            raise UserError("model.family = bert has learned positions, LayerNorm, biases and a tied head; leave these settings out")


class Mesh(Section):
    dp: PositiveInt | None = None
    """Data-parallel degree; left out: what remains of the ranks."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    cp: PositiveInt = 1
    """Context-parallel degree: ranks that each hold a part of every sequence, and between them all heads in attention (Ulysses)."""
    tp: PositiveInt = 1
    """Tensor-parallel degree."""
    ranks: PositiveInt | None = None
    """Ranks to fork on a machine without a GPU; left out: dp x pp x cp x tp."""

    @property
    def degrees(self) -> dict[str, int]:
        """By axis, in the order of the grid; dp is 1 where it was left out."""
        return {"dp": self.dp or 1, "pp": self.pp, "cp": self.cp, "tp": self.tp}

    @property
    def world(self) -> int:
        """Ranks of the whole mesh."""
        return math.prod(self.degrees.values())


class Data(Section):
    train: tuple[str, ...] = ()
    """Shard prefixes as `megalite prepare` or Megatron wrote them, each PREFIX or PREFIX=WEIGHT."""
    valid: str | None = None
    """Shard prefix to validate on; left out: the .valid split beside the first training prefix, where there is one."""
    tokenizer: str | None = None
    """Tokenizer file or name; left out: the one stored beside the shards."""
    sequence: PositiveInt | None = None
    """Length s of a training sample; left out: model.sequence."""
    document_mask: bool = False
    """GPT: a token sees its own document alone, counts its position from that document's start, and no document's end predicts the next
    one's start."""
    whole_word: bool = False
    """BERT: mask whole words instead of single word pieces."""
    mask_fraction: float = Field(default=0.15, gt=0, lt=1)
    """BERT: share of the tokens that must be predicted."""
    corpus: tuple[str, ...] = ()
    """Text to prepare when the shards do not exist yet, as given to `megalite prepare` (stdlib: the Python standard library)."""
    corpus_tokenizer: str | None = None
    """Tokenizer for that preparation, as `megalite prepare --tokenizer`."""
    corpus_vocab: PositiveInt | None = None
    """Vocabulary size for that preparation, as `megalite prepare --vocab-size`."""


class Train(Section):
    steps: PositiveInt = 1000
    """Optimizer steps."""
    global_batch: PositiveInt = 256
    """Sequences an optimizer step, over the whole mesh."""
    micro_batch: PositiveInt = 1
    """Sequences a rank takes at once; global_batch / (dp x micro_batch) microbatches make a step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of weights and activations; master weights and moments are always fp32. fp16 scales the loss, dynamically."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "looped", "zerobubble"] = "1f1b"
    """Order of the microbatches in the pipeline; interleaved: 1f1b with several chunks of layers a rank, which shortens the bubble; looped:
    gpipe with several chunks, breadth first, so that ZeRO-3 gathers a chunk's weights once for all microbatches, for more memory;
    zerobubble: 1f1b or interleaved with gradients of weights made where a rank would wait, and all ranks hold as much as the first."""
    chunks: PositiveInt | None = None
    """Chunks of layers a rank holds under the interleaved and looped schedules; left out: 2. Under zerobubble; left out: 1."""
    reduce: Literal["microbatch", "step"] | None = None
    """ZeRO-2 and 3 reduce gradients after every microbatch (they stay sharded; the default) or once a step (less traffic, more memory), as
    ZeRO-0 and 1 always do."""
    recompute: Literal["none", "selective", "full"] = "none"
    """full: blocks keep only their input and compute the rest again in the backward pass, for a third more work; selective: they keep what
    is dear, matrix products, attention and what came over a link, and compute norms, activations and rotations again."""
    recompute_layers: PositiveInt | None = None
    """Blocks of every chunk of layers that compute again, the first ones; left out: all."""
    compile: bool = False
    """torch.compile every block: what lies between its matrix products becomes few kernels. Not with mesh.tp or mesh.cp, and under ZeRO-3
    only where a stage's weights stay for a step."""
    loss_pieces: PositiveInt = 1
    """Pieces of the vocabulary in which the head makes logits, each again in the backward pass: one is in memory at a time, and the head's
    work grows by a third."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks split the sequence between the cut matrix products too: norms, dropout and what they keep."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm over the whole mesh; 0 switches clipping off."""

    @field_validator("schedule", mode="before")
    @classmethod
    def _refuse_what_is_shaped_like_a_v(cls, schedule: Any) -> Any:
        if str(schedule).lower() in V_SHAPED:
            raise UserError(
                f"train.schedule = {schedule} has the first and the last layers on one rank, which no other part of megalite knows; "
                "use zerobubble"
            )
        return schedule


class Optimizer(Section):
    lr: PositiveFloat = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices and embeddings; biases and norms are never decayed."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: cosine or linear down to min_lr, wsd (flat, then linear over the last decay_fraction), or constant."""
    warmup: NonNegativeInt = 100
    """Steps of linear warm-up."""
    min_lr: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of lr."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the steps that decays."""


class Validation(Section):
    every: NonNegativeInt = 200
    """Steps between two validations; 0: only at the end."""
    batches: PositiveInt = 8
    """Global batches a validation reads."""


class Config(Section):
    """One training run."""

    name: str = "run"
    """What the run is called; recipes carry their own name."""
    run: Run = Run()
    model: Model = Model()
    mesh: Mesh = Mesh()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    deepspeed: str | None = None
    """DeepSpeed JSON with zero_optimization and what else is DeepSpeed's; left out: no ZeRO (stage 0)."""
    log: Log = Log()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    watch: Watch = Watch()
    task: Task | None = None
    """What `megalite finetune` trains for."""

    def model_post_init(self, _: Any) -> None:
        if self.data.document_mask and self.model.family == "bert":
            raise UserError(
                "data.document_mask = true is for samples packed from many documents, but a sample of model.family = bert is one padded "
                "pair; leave data.document_mask out"
            )

    @property
    def num_chunks(self) -> int:
        """Chunks of layers a rank holds."""
        return self.train.chunks or CHUNKED.get(self.train.schedule, 1)

    @property
    def sequence(self) -> int:
        """Length of a training sample."""
        return self.data.sequence or self.model.sequence

    @property
    def sequence_parts(self) -> dict[str, int]:
        """Into how many parts the axes cut the hidden state's sequences, by the name of the setting."""
        return {"mesh.cp": self.mesh.cp, **({"mesh.tp": self.mesh.tp} if self.train.sequence_parallel else {})}


def run_folder(config: Config) -> Path:
    """Where the run writes: run.folder, or runs/NAME."""
    return Path(config.run.folder or f"runs/{config.name}")


def load(name: str, *, overrides: dict[str, Any] | None = None) -> Config:
    """A recipe by name, or a run file by path, with `overrides` (a nested mapping) on top: default < file < flag.

    Raises UserError for a name that is neither, and for keys and values that no section knows.
    """
    return parse(merge(read(name), overrides or {}), source=name)


def parse(document: dict[str, Any], *, source: str) -> Config:
    """A mapping as a Config; every wrong key and value in one UserError."""
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Config)}") from None
