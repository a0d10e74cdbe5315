"""Many layouts at once: one column a setting, one row a layout; and every legal one of a run on so many GPUs.

In: a run config and the number of GPUs.  Out: `Layouts`. Legal is what `fit.py` and `ds_config.py` accept, here in arrays; a test holds
them together. A row becomes a run config again in choices.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.config import CHUNKED, Config

Array = np.ndarray
SCHEDULES = ("1f1b", "gpipe", "interleaved", "looped", "zerobubble")
ZERO_BUBBLE = SCHEDULES.index("zerobubble")
RECOMPUTE = ("none", "selective", "full")
OFFLOAD = ("none", "optimizer", "parameters")
REDUCE = ("microbatch", "step")
BUCKETS = (50_000_000, 200_000_000)
LIVE = (100_000_000, 500_000_000, 2_000_000_000)


@dataclass(frozen=True)
class Layouts:
    """Columns of equal length; names are those of the config, choices are indices into the tuples above."""

    dp: Array
    tp: Array
    pp: Array
    cp: Array
    schedule: Array
    chunks: Array  # of layers a rank holds, 1 where the schedule has no chunks
    micro: Array  # sequences of a microbatch
    stage: Array  # ZeRO
    reduce: Array  # under ZeRO 2 and 3; see `once`
    offload: Array
    recompute: Array
    split_sequence: Array  # sequence parallelism beside tensor parallelism
    bucket: Array  # elements of a reduce bucket (and of the gather and prefetch buckets)
    live: Array  # elements that ZeRO-3 keeps gathered at most
    batch: Array  # sequences of an optimizer step

    def __len__(self) -> int:
        return len(self.dp)

    @property
    def world(self) -> Array:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def copies(self) -> Array:
        """Ranks that hold the same weights, over which ZeRO shards them."""
        return self.dp * self.cp

    @functools.cached_property
    def microbatches(self) -> Array:
        return self.batch // (self.dp * self.micro)

    @property
    def several(self) -> Array:
        """Whether a rank has several chunks of layers, by turns."""
        return (self.chunks > 1) & (self.schedule >= SCHEDULES.index("interleaved"))

    @property
    def once(self) -> Array:
        """Whether gradients are reduced once a step, and whole until then."""
        return (self.stage < 2) | (self.reduce == 1)

    @property
    def shards(self) -> Array:
        """Over how many ranks gradients' sums, master weights and moments are cut."""
        return np.where(self.stage == 0, 1, self.copies)

    def take(self, rows: Any) -> Layouts:
        return Layouts(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @classmethod
    def of(cls, **columns: Any) -> Layouts:
        """From columns or single numbers; what is left out is the plainest choice."""
        plain: dict[str, Any] = {
            "cp": 1, "schedule": 0, "chunks": 1, "stage": 0, "reduce": 0, "offload": 0, "recompute": 0, "split_sequence": 0,
            "bucket": 50_000_000, "live": 500_000_000,
        }  # fmt: skip
        given = np.broadcast_arrays(*({**plain, **columns}[field.name] for field in dataclasses.fields(cls)))
        return cls(*(np.atleast_1d(np.asarray(column, dtype=np.int64)) for column in given))

    @classmethod
    def join(cls, parts: list[Layouts]) -> Layouts:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)))

    def row(self, number: int) -> dict[str, int]:
        return {field.name: int(getattr(self, field.name)[number]) for field in dataclasses.fields(self)}


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def legal(config: Config, found: Layouts) -> Array:
    """Which rows `fit.resolve_mesh` and the DeepSpeed rules accept for this model."""
    model, sequence = config.model, config.sequence
    chunked = np.isin(found.schedule, [number for number, name in enumerate(SCHEDULES) if name in CHUNKED])
    many = found.microbatches
    good = (model.heads % (found.tp * found.cp) == 0) & (model.num_kv_heads % found.tp == 0)
    good &= (model.vocab or 1 << 30) // found.tp >= config.train.loss_pieces
    if config.train.compile:
        good &= (found.tp * found.cp == 1) & (found.schedule != ZERO_BUBBLE) & (found.recompute != RECOMPUTE.index("selective"))
    good &= (found.pp * found.chunks <= model.layers + 2) & (~chunked | (found.pp > 1)) & (chunked | (found.chunks == 1))
    good &= (found.batch % (found.dp * found.micro) == 0) & (many > 0)
    good &= (found.schedule != SCHEDULES.index("1f1b")) | (many >= found.pp)
    rounds = np.maximum(1, many // found.pp)
    good &= ((found.schedule != SCHEDULES.index("interleaved")) & (found.schedule != ZERO_BUBBLE)) | (many % rounds == 0)
    good &= (found.split_sequence == 0) | (found.tp > 1)
    good &= sequence % (found.cp * np.where(found.split_sequence == 1, found.tp, 1)) == 0
    good &= (found.reduce == 0) | (found.stage >= 2)
    return good & (found.stage >= np.array([0, 1, 3])[found.offload])


def enumerate_layouts(config: Config, world: int, *, pinned: dict[str, int] | None = None) -> Layouts:
    """Every legal layout of `world` GPUs; `pinned` columns have that value. Choices that compute the same are made once."""
    pinned = pinned or {}
    parts = [part for mesh in _meshes(config, world, pinned) if len(part := _choices(config, mesh, pinned))]
    return Layouts.join(parts) if parts else Layouts.of(dp=[], tp=[], pp=[], micro=[], batch=[])


def _meshes(config: Config, world: int, pinned: dict[str, int]) -> Iterator[dict[str, int]]:
    model = config.model
    for tp in divisors(world):
        if model.heads % tp or model.num_kv_heads % tp:
            continue
        for cp in divisors(world // tp):
            if model.heads % (tp * cp) or config.sequence % cp:
                continue
            for pp in divisors(world // tp // cp):
                mesh = {"dp": world // tp // cp // pp, "tp": tp, "pp": pp, "cp": cp}
                if pp > model.layers + 2 or config.train.global_batch % mesh["dp"]:
                    continue
                if all(mesh[axis] == pinned.get(axis, mesh[axis]) for axis in mesh):
                    yield mesh


def _choices(config: Config, mesh: dict[str, int], pinned: dict[str, int]) -> Layouts:
    """All other settings on one mesh."""
    batch, pp = config.train.global_batch, mesh["pp"]
    micros = [micro for micro in divisors(batch // mesh["dp"]) if micro & (micro - 1) == 0 or micro in (3, 6, 12)]
    schedules = [(0, 1)]
    if pp > 1:
        most = (config.model.layers + 2) // pp
        chunks = [number for number in (2, 3, 4, 6, 8) if number <= most]
        schedules += [
            (1, 1),
            *((kind, number) for kind in (2, 3) for number in chunks),
            *((ZERO_BUBBLE, number) for number in (1, *chunks)),
        ]
    # a limit that the vocabulary's weight does not fit into lets go of everything else whenever that weight is there
    words = -(-(config.model.vocab or 0) // mesh["tp"]) * config.model.width
    live_choices = LIVE if "live" in pinned else [limit for limit in LIVE if limit >= words] or LIVE[-1:]
    alone = mesh["dp"] * mesh["cp"] == 1  # nothing to shard over, but there is a host to offload to
    stages = [(0, 0), (1, 1), (3, 2)] if alone else [*((stage, 0) for stage in range(4)), *((stage, 1) for stage in (1, 2, 3)), (3, 2)]
    axes = (
        micros, range(len(schedules)), range(len(stages)), range(len(REDUCE)) if "reduce" in pinned else (0,), range(len(RECOMPUTE)),
        (0, 1) if mesh["tp"] > 1 else (0,), BUCKETS, live_choices,
    )  # fmt: skip
    micro, schedule, zero, reduce, recompute, halved, bucket, live = (
        axis.ravel() for axis in np.meshgrid(*(np.array(axis) for axis in axes), indexing="ij")
    )
    kinds, chunks = np.array(schedules).T[:, schedule]
    stage, offload = np.array(stages).T[:, zero]
    found = Layouts.of(
        **mesh, schedule=kinds, chunks=chunks, micro=micro, stage=stage, reduce=reduce, offload=offload, recompute=recompute,
        split_sequence=halved, bucket=bucket, live=live, batch=batch,
    )  # fmt: skip
    wanted = (stage == 3) | (live == live_choices[0])  # only ZeRO-3 gathers weights
    wanted &= (stage > 1) | (bucket == BUCKETS[0])  # and those below 2 have no buckets
    wanted &= (stage == 3) | (reduce == 0)  # ZeRO-1 does once a step what 2 would
    for column, value in pinned.items():
        wanted &= (found.once if column == "reduce" else getattr(found, column)) == value
    return found.take(legal(config, found) & wanted)
