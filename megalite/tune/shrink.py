"""A run small enough for a laptop that still is the same kind of run.

In: a config.  Out: the same config with fewer, narrower layers and a mesh of at most eight ranks, and a list of what was changed. Kept:
model family and style, ties, the ratio of query to key heads, what divides by tp, which axes the mesh has, schedule, chunks, reduction,
precision, clipping.
"""

from __future__ import annotations

import math

from megalite.config import Config, Mesh

MOST_RANKS = 8
HEAD_WIDTH = 8
SEQUENCE = 16


def shrink(config: Config) -> tuple[Config, list[str]]:
    """The small run, with mesh.dp filled in, and "model.layers 24 -> 4" for everything that differs."""
    mesh = shrink_mesh(config.mesh)
    small = config.model_copy(update={"mesh": mesh})
    dp, pp, tp, stages = mesh.dp or 1, mesh.pp, mesh.tp, mesh.pp * config.num_chunks
    model = config.model
    keys = tp * min(max(2, mesh.cp), max(1, model.num_kv_heads // tp))
    most = model.heads // model.num_kv_heads
    heads = next(keys * ratio for ratio in (*range(min(4, most), most), most) if keys * ratio % (tp * mesh.cp) == 0 or ratio == most)
    width = heads * HEAD_WIDTH
    mlp = max(tp, round(width * model.mlp_width / model.width))
    vocab = 128 if (model.vocab or 0) % tp == 0 else 131
    layers = min(model.layers, max(stages, 3))
    parts = math.prod(small.sequence_parts.values())
    sequence = parts * min(max(2, SEQUENCE // parts), config.sequence // parts)
    changes = {
        "model": {
            "layers": layers, "width": width, "heads": heads, "kv_heads": keys if model.kv_heads else None,
            "mlp": mlp if model.mlp else None, "vocab": vocab, "sequence": sequence, "init_std": 0.1,
        },
        "data": {"sequence": None},
        "train": {"global_batch": dp * 2 * max(pp, 2), "micro_batch": 2, "steps": 100},
        "optimizer": {"lr": 1e-2, "warmup": 2, "eps": 1e-2},
    }  # fmt: skip
    for section, values in changes.items():
        small = small.model_copy(update={section: getattr(small, section).model_copy(update=values)})
    small = Config.model_validate(small.model_dump())
    return small, _said(config, small)


def shrink_mesh(mesh: Mesh) -> Mesh:
    """The mesh itself where it has at most eight ranks, else the smallest of its kind: 2 along every axis that has more than 1."""
    if mesh.world <= MOST_RANKS:
        return mesh.model_copy(update={"dp": mesh.dp or 1, "ranks": None})
    return Mesh(**{axis: min(degree, 2) for axis, degree in mesh.degrees.items()})


def _said(before: Config, after: Config) -> list[str]:
    found = []
    for section in ("mesh", "model", "data", "train", "optimizer"):
        old, new = getattr(before, section).model_dump(), getattr(after, section).model_dump()
        found += [f"{section}.{key} {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    return found
