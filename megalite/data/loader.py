"""Global batch n -> this rank's microbatches; a background thread keeps the next ones ready.

In: a source (`Mixture` or `InOrder`) and the batch sizes. Out: `Loader.step(n)`, a list of {name: tensor} with the microbatch first.
Step n is samples [n*global_batch, (n+1)*global_batch) on every mesh; data-parallel rank r takes the contiguous r-th part and cuts
it into microbatches. Nothing but n decides what comes: no state to save, no global random numbers. `open_train` and `open_valid`
make the sources from the run config, and check that shards, tokenizer and model fit together.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megalite.config import Data, Model
from megalite.data.causal import Causal
from megalite.data.manifest import Manifest, output_of, prepare_line
from megalite.data.masked import Masked
from megalite.data.mixture import InOrder, Mixture
from megalite.data.shards import Shard
from megalite.data.tokenizer import Tokenizer, open_tokenizer, stored_tokenizer
from megalite.errors import UserError

if TYPE_CHECKING:
    import torch

AHEAD = 2  # steps kept ready


class Source(Protocol):
    def sample(self, number: int) -> dict[str, np.ndarray]: ...


class Loader:
    """Microbatches of any optimizer step, for one data-parallel rank. Every other rank of the mesh reads the same."""

    def __init__(self, source: Source, *, global_batch: int, micro_batch: int, dp: int = 1, dp_rank: int = 0) -> None:
        if global_batch % (dp * micro_batch):
            raise UserError(
                f"train.global_batch = {global_batch} is not divisible by mesh.dp x train.micro_batch = {dp} x {micro_batch} = "
                f"{dp * micro_batch}; choose a multiple of it"
            )
        assert 0 <= dp_rank < dp, f"data-parallel rank {dp_rank} of {dp}"
        self.source, self.global_batch, self.micro_batch = source, global_batch, micro_batch
        self._share = global_batch // dp
        self._first = dp_rank * self._share
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ready: dict[int, Future[list[dict[str, torch.Tensor]]]] = {}

    @property
    def num_microbatches(self) -> int:
        return self._share // self.micro_batch

    def step(self, number: int) -> list[dict[str, torch.Tensor]]:
        """This rank's microbatches of optimizer step `number`; what reading them raised is raised here."""
        wanted = range(number, number + 1 + AHEAD)
        for stale in [n for n in self._ready if n not in wanted]:
            self._ready.pop(stale).cancel()
        for n in wanted:
            if n not in self._ready:
                self._ready[n] = self._thread.submit(self._read, n)
        return self._ready.pop(number).result()

    def close(self) -> None:
        """End the thread; a loader that was closed reads no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, number: int) -> list[dict[str, torch.Tensor]]:
        import torch

        start = number * self.global_batch + self._first
        batches = []
        for at in range(start, start + self._share, self.micro_batch):
            samples = [self.source.sample(i) for i in range(at, at + self.micro_batch)]
            batches.append({name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]})
        return batches


@dataclass(frozen=True)
class Opened:
    """A source of samples, and what the model must know about their tokens."""

    source: Mixture | InOrder
    tokenizer: Tokenizer | None
    """None for shards that name none (Megatron's) when data.tokenizer is not set."""
    vocab_size: int
    """model.vocab where it is set, else the tokenizer's."""
    shards: tuple[Shard, ...]


def open_train(data: Data, *, model: Model, seed: int) -> Opened:
    """The shuffled blend of all training shards."""
    if not data.train:
        raise UserError(f"data.train names no shards; set it to a prefix made by: {prepare_line('PREFIX')}")
    prefixes, weights = zip(*map(_parse, data.train), strict=True)
    shards = tuple(Shard(resolve(prefix)) for prefix in prefixes)
    tokenizer, vocab_size = _agree(shards, data, model)
    datasets = [_dataset(shard, tokenizer, vocab_size, data=data, model=model, seed=seed + place) for place, shard in enumerate(shards)]
    if None in weights and any(weights):
        raise UserError(
            f"data.train = {' '.join(data.train)} gives a weight to some shards only; give one to all (PREFIX=WEIGHT) or to none"
        )
    shares = [weight or len(dataset) for weight, dataset in zip(weights, datasets, strict=True)]  # without weights: by size
    return Opened(Mixture(datasets, weights=shares, seed=seed), tokenizer, vocab_size, shards)


def open_valid(data: Data, *, model: Model) -> Opened | None:
    """The validation shard in order, masked alike in every run; None where there is none."""
    prefix = data.valid
    if prefix is None and data.train:
        beside = f"{output_of(resolve(_parse(data.train[0])[0]))}.valid"
        prefix = beside if Path(f"{beside}.idx").is_file() else None
    if prefix is None:
        return None
    shard = Shard(prefix if Path(f"{prefix}.idx").is_file() else f"{prefix}.valid")
    if data.valid is None and not shard.num_tokens:
        return None  # too few documents for a split of its own
    tokenizer, vocab_size = _agree((shard, *(Shard(resolve(_parse(p)[0])) for p in data.train)), data, model)
    return Opened(InOrder(_dataset(shard, tokenizer, vocab_size, data=data, model=model, seed=0)), tokenizer, vocab_size, (shard,))


def find_tokenizer(data: Data) -> Tokenizer | None:
    """The tokenizer of this data: data.tokenizer, or what lies beside the first training shards; None where there is none."""
    if data.tokenizer:
        return open_tokenizer(data.tokenizer)
    return stored_tokenizer(resolve(_parse(data.train[0])[0])) if data.train else None


def resolve(prefix: str) -> str:
    """PREFIX where PREFIX.idx exists, else its training split."""
    return prefix if Path(f"{prefix}.idx").is_file() or prefix.endswith(".train") else f"{prefix}.train"


def _parse(entry: str) -> tuple[str, float | None]:
    """PREFIX or PREFIX=WEIGHT."""
    prefix, mark, weight = entry.rpartition("=")
    if not mark:
        return entry, None
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"data.train = {entry}: weight {weight} is no number above 0; write PREFIX=WEIGHT, for instance {prefix}=0.5")
    return prefix, value


def _agree(shards: tuple[Shard, ...], data: Data, model: Model) -> tuple[Tokenizer | None, int]:
    """The one tokenizer of all shards, and the size of the model's vocabulary."""
    given = open_tokenizer(data.tokenizer) if data.tokenizer else None
    reference = ("data.tokenizer = " + data.tokenizer, given.fingerprint) if given and data.tokenizer else None
    tokenizer = given
    for shard in shards:
        manifest = Manifest.find(shard.prefix)
        if manifest is None:
            continue
        reference = reference or (shard.prefix, manifest.tokenizer)
        if manifest.tokenizer != reference[1]:
            raise UserError(
                f"{shard.prefix} was made with tokenizer {manifest.tokenizer[:12]}, {reference[0]} has {reference[1][:12]}; "
                "prepare all shards with one tokenizer, or leave data.tokenizer out"
            )
        tokenizer = tokenizer or stored_tokenizer(shard.prefix)
    size = model.vocab or (tokenizer.vocab_size if tokenizer else None)
    if size is None:
        raise UserError(f"{shards[0].prefix} names no tokenizer (Megatron's files do not); set data.tokenizer or model.vocab")
    if tokenizer and tokenizer.vocab_size > size:
        raise UserError(
            f"model.vocab = {size} is smaller than the tokenizer's vocabulary of {tokenizer.vocab_size}; leave model.vocab out or raise it"
        )
    return tokenizer, size


def _dataset(shard: Shard, tokenizer: Tokenizer | None, vocab_size: int, *, data: Data, model: Model, seed: int) -> Causal | Masked:
    sequence = data.sequence or model.sequence
    if sequence > model.sequence:
        raise UserError(f"data.sequence = {sequence} is longer than model.sequence = {model.sequence}; lower it or raise model.sequence")
    if model.family == "gpt":
        return Causal(shard, sequence=sequence, vocab_size=vocab_size, eos=_end_of_text(shard, tokenizer) if data.document_mask else None)
    if tokenizer is None:
        raise UserError(f"model.family = bert needs the tokenizer of {shard.prefix} to mask its tokens; set data.tokenizer")
    return Masked(shard, tokenizer, sequence=sequence, seed=seed, mask_fraction=data.mask_fraction, whole_word=data.whole_word)


def _end_of_text(shard: Shard, tokenizer: Tokenizer | None) -> int:
    """The token that documents end with, for data.document_mask."""
    if tokenizer is None:
        raise UserError(
            f"data.document_mask needs the end-of-text token of {shard.prefix}, which names no tokenizer; set data.tokenizer, "
            "or leave data.document_mask out"
        )
    if "eos" not in tokenizer.special:
        raise UserError(
            f"data.document_mask needs an end-of-text token, but the tokenizer of {shard.prefix} has only "
            f"{', '.join(sorted(tokenizer.special)) or 'no special token'}; use another tokenizer, or leave data.document_mask out"
        )
    return tokenizer.special["eos"]
