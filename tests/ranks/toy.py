"""A small model without DeepSpeed, to be saved and loaded by real ranks: a rank's pieces are cut here as ZeRO cuts them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint import manifest, storage, store
from megalite.checkpoint.store import Store
from megalite.config import Checkpoint
from megalite.launch import run_ranks
from megalite.layout import Cut
from megalite.mesh import Mesh

WARM = ("megalite.checkpoint.store",)
WEIGHTS: dict[str, tuple[tuple[int, ...], int | None, tuple[int, ...]]] = {  # name -> shape, dim of the tensor-parallel cut, sections
    "embed.weight": ((11, 4), 0, ()),  # a vocabulary that does not divide
    "layers.0.qkv.weight": ((12, 5), 0, (6, 3, 3)),  # fused, grouped heads
    "layers.0.qkv.bias": ((12,), 0, (6, 3, 3)),
    "layers.0.out.weight": ((5, 9), 1, ()),  # a row cut
    "layers.0.norm.weight": ((5,), None, ()),
    "layers.1.scale": ((), None, ()),
    "layers.1.cube": ((3, 4, 5), 1, (2, 2)),
    "layers.1.one": ((1, 1), None, ()),
    "head.weight": ((11, 4), 0, ()),  # tied to embed.weight
}
TIED = {"head.weight": "embed.weight"}
LOGICAL = [name for name in WEIGHTS if name not in TIED]


@dataclasses.dataclass
class Piece:
    cut: Cut
    start: int
    master: Tensor
    moments: dict[str, Tensor]
    first: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """`zero`: replicated (ZeRO 0), flat (1, 2: the whole of a stage's weights in one buffer), sharded (3: every weight by itself)."""

    dp: int
    pp: int
    tp: int
    zero: str

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return f"dp{self.dp} pp{self.pp} tp{self.tp} {self.zero}"


LAYOUTS = [
    Layout(1, 1, 1, "flat"),
    Layout(2, 1, 1, "sharded"),
    Layout(1, 1, 2, "sharded"),
    Layout(2, 1, 2, "flat"),
    Layout(1, 2, 3, "flat"),
    Layout(3, 2, 1, "sharded"),
    Layout(2, 2, 1, "replicated"),
]


def full(name: str, kind: str, salt: int = 0) -> Tensor:
    """The logical tensor: random, decided by its name."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{TIED.get(name, name)} {kind} {salt}".encode()))
    return torch.randn(WEIGHTS[name][0], generator=draw)


def ranges(sizes: list[int], mesh: Mesh, zero: str) -> list[range]:
    """Which flat range of every local shard this dp rank owns."""
    if zero == "replicated":
        return [range(size) for size in sizes]
    if zero == "sharded":
        length = [-(-size // mesh.dp) for size in sizes]
        return [range(min(mesh.dp_rank * n, size), min((mesh.dp_rank + 1) * n, size)) for n, size in zip(length, sizes, strict=True)]
    begins = list(itertools.accumulate(sizes, initial=0))
    part = -(-begins[-1] // mesh.dp)
    low, high = mesh.dp_rank * part, (mesh.dp_rank + 1) * part
    return [range(min(max(low - at, 0), size), max(min(high - at, size), 0)) for at, size in zip(begins, sizes, strict=False)]


def own(layout: Layout, rank: int, *, fill: bool, salt: int = 0, weights: dict | None = None) -> list[Piece]:
    """What a rank owns, filled with the logical values or with NaN to be read into."""
    mesh = Mesh(dp=layout.dp, pp=layout.pp, tp=layout.tp, rank=rank)
    names = [name for number, name in enumerate(weights or WEIGHTS) if number * mesh.pp // len(weights or WEIGHTS) == mesh.pp_rank]
    if mesh.pp == 1:
        names = [name for name in names if name not in TIED]  # one stage holds one weight, not two copies
    cuts = []
    for name in names:
        shape, dim, parts = (weights or WEIGHTS)[name]
        cuts.append(Cut(name, shape, dim, parts, index=mesh.tp_rank, num=mesh.tp))
    held = []
    sizes = [torch.Size(cut.local_shape).numel() for cut in cuts]
    for cut, place in zip(cuts, ranges(sizes, mesh, layout.zero), strict=True):
        if not len(place):
            continue
        flat = {kind: torch.full((len(place),), torch.nan) for kind in store.KINDS}
        if fill:
            flat = {kind: cut.take(full(cut.name, kind, salt)).flatten()[place.start : place.stop].clone() for kind in store.KINDS}
        tied = cut.name in TIED or cut.name in TIED.values()
        copy = (cut.dim is None and mesh.tp_rank) or (tied and not mesh.first_stage) or (layout.zero == "replicated" and mesh.dp_rank)
        held.append(Piece(cut, place.start, flat.pop("weights"), flat, not copy))
    return held


def write(folder: Path, layout: Layout, *steps: int, salt: int = 0, **settings: Any) -> None:
    def work(rank: int) -> None:
        opened = Store(folder, Checkpoint(**{"keep": 9, "background": False, **settings}), tied=TIED)
        held = own(layout, rank, fill=True, salt=salt)
        for piece in held:
            if not piece.first:
                piece.master.fill_(torch.nan)  # of several copies only the first may be stored
        for step in steps:
            opened.save(step, held, {"config": {"name": "toy"}})

    run_ranks(layout.world, work, warm=WARM)


def read(path: Path, layout: Layout, *, weights: dict | None = None) -> dict[str, Any]:
    """Load on every rank and compare every element with the logical values; returns the facts."""

    def work(rank: int) -> dict[str, Any]:
        held = own(layout, rank, fill=False, weights=weights)
        facts = Store(path.parent, Checkpoint(), tied=TIED).load(path, held)
        for found, wanted in zip(held, own(layout, rank, fill=True), strict=True):
            assert torch.equal(found.master, wanted.master), found.cut
            assert all(torch.equal(found.moments[kind], wanted.moments[kind]) for kind in wanted.moments), found.cut
        return facts

    return run_ranks(layout.world, work, warm=WARM)[0]


def reseal(path: Path, **changes: Any) -> None:
    """Make the manifest agree with what lies there now, as a forger would: the index's checksum, `changes`, and the seal."""
    body = json.loads((path / "manifest.json").read_text()) | changes
    index = (path / storage.INDEX).read_bytes()
    body["files"][storage.INDEX] = {"bytes": len(index), manifest.SEAL: manifest.checksum(index)}
    body[manifest.SEAL] = manifest.seal(body)
    (path / "manifest.json").write_text(json.dumps(body))
