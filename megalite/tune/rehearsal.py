"""`--dry-run`: the real engine on fake tensors says what the closed form predicts, for `megalite tune` and `megalite train`.

In: layouts that a search found, or a run.  Out: on the console, for the fullest rank: memory at start-up and in a step with the lines of
code that own it, FLOPs, and collectives with their bytes. Nothing is trained and nothing is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from megalite.config import Config
from megalite.ds_config import read_document
from megalite.errors import UserError
from megalite.fit import resolve_mesh
from megalite.hardware import GIB
from megalite.log import open_console, quiet_foreign
from megalite.tune import choices, memory
from megalite.tune.dryrun import Trace, trace
from megalite.tune.search import Found, for_precision
from megalite.tune.shape import Shape
from megalite.tune.splits import split

OWNERS = 8


def rehearse(found: Found, rows: list[int]) -> None:
    """Each layout's fullest rank, predicted beside traced."""
    quiet_foreign()
    console = open_console()
    table = Table("dry run", "rank", "predicted, GiB", "traced, GiB", "at start-up", "host, GiB", "collectives a step", "GiB in them")
    for row in rows:
        layout = found.judged.layouts.take([row])
        words = layout.row(0)
        config = choices.as_config(found.config, words)
        runtime = for_precision(found.runtime, config)
        bare = dataclasses.replace(runtime, memory=dataclasses.replace(runtime.memory, context=0.0))  # fake tensors know no CUDA
        shape = Shape.of(config)
        ranks = split(shape, layout, bare.rule)
        account = memory.waterfall(shape, layout, ranks, bare)
        rank = int(ranks.place[int(account["rank"][0]), 0]) * config.mesh.cp * config.mesh.tp
        seen = trace(config, choices.document(words, config), rank=rank)
        gpu, cpu = _gpu(seen), seen.peak["cpu"] / GIB
        table.add_row(
            choices.say(words), f"{rank}", f"{float(memory.peak(account)[0]) / GIB:.2f}", f"{gpu / GIB:.2f}",
            f"{seen.start_up['fakegpu'] / GIB:.2f}", f"{cpu:.2f}", f"{len(seen.sent)}", f"{sum(size for *_, size in seen.sent) / GIB:.2f}",
        )  # fmt: skip
    console.print(table)


def rehearse_run(config: Config) -> int:
    """`megalite train --dry-run`: rank 0 and the last stage's first rank of the run's own mesh."""
    quiet_foreign()
    if config.model.vocab is None:
        raise UserError("a dry run reads no shards, so it must be told the vocabulary; give --model.vocab")
    config = resolve_mesh(config, config.mesh.world)
    document = read_document(config)
    console = open_console()
    ends = sorted({0, (config.mesh.pp - 1) * config.mesh.cp * config.mesh.tp})
    for rank in ends:
        seen = trace(config, document, rank=rank)
        console.print(f"rank {rank} of {config.mesh.world}", _books(seen), _collectives(seen), sep="\n")
    return 0


def _gpu(seen: Trace) -> int:
    return max(seen.peak["fakegpu"], seen.start_up["fakegpu"])


def _books(seen: Trace) -> Table:
    table = Table("held by the GPU, at most", "GiB")
    table.add_row("while the engine is built", f"{seen.start_up['fakegpu'] / GIB:.3f}")
    table.add_row("in a step", f"{seen.peak['fakegpu'] / GIB:.3f}", style="bold")
    for owner, size in seen.owners.get("fakegpu", [])[:OWNERS]:
        table.add_row(f"  {owner}", f"{size / GIB:.3f}")
    table.add_row("between two steps", f"{seen.steady['fakegpu'] / GIB:.3f}")
    table.add_row("host memory", f"{max(seen.peak['cpu'], seen.start_up['cpu']) / GIB:.3f}")
    table.add_row("matrix products and attention of a step, TFLOP", f"{seen.flops / 1e12:.3f}")
    return table


def _collectives(seen: Trace) -> Table:
    table = Table("collectives of a step", "ranks", "calls", "GiB")
    found: dict[tuple[str, int], list[Any]] = {}
    for kind, ranks, size in seen.sent:
        entry = found.setdefault((kind.strip("_"), ranks), [0, 0])
        entry[0] += 1
        entry[1] += size
    for (kind, ranks), (calls, size) in sorted(found.items()):
        table.add_row(kind, f"{ranks}", f"{calls}", f"{size / GIB:.4f}")
    return table
