"""The tile of every kernel on every GPU, from tables that are committed as data: no tuning while a model trains, so ranks never wait for
one that is still trying, and a run is the same twice. `python -m megalite_kernels.sweep` remakes tables.json on a GPU;
tests/unit/kernels/test_compiled.py compiles every entry and reads the machine code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch

KERNELS = ("forward", "by_keys_fused", "by_keys", "by_rows", "prepare")
BLOCKS = (32, 64, 128, 256)
KINDS = ("band", "spans", "features", "padded", "any")
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut up: rows x keys a tile, warps a program, tiles loaded ahead, tiles loaded by descriptor (TMA)."""

    rows: int
    keys: int
    warps: int
    stages: int
    descriptor: bool = False


@cache
def read_tables() -> dict[str, dict[str, dict[str, dict[str, Tile]]]]:
    """arch -> kernel -> block -> kind -> Tile."""
    document = json.loads((resources.files("megalite_kernels") / "tables.json").read_text())
    return {
        arch: {
            kernel: {block: {kind: Tile(*numbers) for kind, numbers in kinds.items()} for block, kinds in blocks.items()}
            for kernel, blocks in kernels.items()
        }
        for arch, kernels in document.items()
    }


def block_of(width: int) -> int:
    """The block a head width is computed in."""
    return next(block for block in BLOCKS if width <= block)


def kind_of(width: int, *, spans: bool, features: bool) -> str:
    """features: dropout or a soft cap. A width that is no power of two leaves part of its block empty."""
    return "padded" if block_of(width) != width else "features" if features else "spans" if spans else "band"


def choose(arch: str, kernel: str, *, width: int, kind: str, dtype: torch.dtype) -> Tile | None:
    """The table's tile, or None where it has none: then a kernel of another form does the work.

    fp32 is there for checking and gets small tiles, since it takes twice the memory.
    """
    if dtype == torch.float32 and arch != INTERPRETER:
        return Tile(rows=32, keys=16 if width > 128 else 32, warps=4, stages=1)
    tiles = read_tables()[arch][kernel].get(str(block_of(width)))
    return None if tiles is None else tiles.get(kind) or tiles["any"]


def entries(arch: str) -> list[tuple[str, int, str, Tile]]:
    """(kernel, block, kind, tile) of a table."""
    return [
        (kernel, int(block), kind, tile)
        for kernel, blocks in read_tables()[arch].items()
        for block, kinds in blocks.items()
        for kind, tile in kinds.items()
    ]


@cache
def arch_of(device: torch.device) -> str:
    """Which table serves a device. sm80's tiles fit the shared memory of sm86, sm89 and sm120 too, and any sm10x runs sm100's."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")
