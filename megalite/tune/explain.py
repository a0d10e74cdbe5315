"""One layout accounted for: memory as a waterfall, time by part, as tables and as a picture.

In: a layout.  Out: `Account`; rich tables; a self-contained HTML page with two bar charts, drawn as SVG.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table

from megalite.config import Config
from megalite.errors import UserError
from megalite.hardware import GIB
from megalite.tune import memory, speed
from megalite.tune.layouts import Layouts
from megalite.tune.search import WHEN, Found, for_precision, interval
from megalite.tune.shape import Shape
from megalite.tune.splits import split

MEMORY = {
    "weights": "weights in the type of the run",
    "gathered": "weights that ZeRO-3 gathered",
    "optimizer": "fp32 master weights and two moments",
    "gradients": "gradients",
    "buckets": "buckets of the reduction",
    "activations": "activations kept for the backward pass",
    "working": "logits, recomputed blocks, copies of the update",
    "batch": "ids, labels, weights of the batch",
    "runtime": "context and libraries",
}
TIME = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "norms, activations, loss",
    "launch": "waiting for kernels to be launched",
    "tp": "tensor parallelism",
    "cp": "context parallelism",
    "bubble": "pipeline fills and drains",
    "p2p": "sends between stages",
    "zero": "gradients and weights over dp",
    "optimizer": "update",
    "host": "update on the host, host link",
    "fixed": "the rest of a step",
}


@dataclass(frozen=True)
class Account:
    """Bytes and seconds by part, the largest of the parts being what they are called in MEMORY and TIME."""

    bytes: dict[str, float]
    usable: float
    moment: str
    rank: str
    seconds: dict[str, float]
    interval: tuple[float, float]
    host: float


def account(config: Config, layout: Layouts, found: Found) -> Account:
    """Of a layout of one row."""
    shape, runtime = Shape.of(config), for_precision(found.runtime, config)
    ranks = split(shape, layout, runtime.rule)
    held = memory.waterfall(shape, layout, ranks, runtime)
    parts = speed.step_time(shape, layout, ranks, cluster=found.cluster, runtime=runtime)
    whole = float(speed.total(parts, layout, found.cluster, runtime)[0])
    seconds = {name: float(value[0]) for name, value in parts.items()}
    seconds["fixed"] += whole - sum(seconds.values())  # the slowest of many nodes
    place = int(ranks.place[int(held["rank"][0]), 0])
    blocks = int(ranks.blocks[int(held["rank"][0]), 0])
    return Account(
        bytes={name: float(held[name][0]) for name in memory.PARTS},
        usable=found.cluster.usable,
        moment=WHEN[int(held["moment"][0])],
        rank=f"stage {place} with {blocks} blocks",
        seconds=seconds,
        interval=interval(whole, runtime.spread),
        host=float(memory.host(shape, layout, ranks, runtime)[0]),
    )


def tables(found: Account, name: str) -> Group:
    """Memory and time of the layout called `name`, side by side with their sums."""
    held = Table(f"{name}: memory of {found.rank} at {found.moment}", "GiB")
    for part, size in found.bytes.items():
        held.add_row(MEMORY[part], f"{size / GIB:.2f}")
    held.add_row("in all", f"{sum(found.bytes.values()) / GIB:.2f} of {found.usable / GIB:.1f}", style="bold")
    held.add_row("host memory a rank", f"{found.host / GIB:.2f}")
    times = Table("time of a step", "ms", "share")
    whole = sum(found.seconds.values())
    for part, seconds in found.seconds.items():
        times.add_row(TIME[part], f"{1e3 * seconds:.1f}", f"{seconds / whole:.1%}")
    low, high = found.interval
    times.add_row("in all", f"{1e3 * whole:.1f}", f"80 %: {1e3 * low:.0f} to {1e3 * high:.0f}", style="bold")
    return Group(held, times)


def draw(found: Account, name: str, path: Path) -> None:
    """The same as a page with two charts. Raises UserError where it cannot be written."""
    held = [(MEMORY[part], size / GIB) for part, size in found.bytes.items()]
    times = [(TIME[part], 1e3 * seconds) for part, seconds in found.seconds.items()]
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(name)}</title>"
        "<style>body{font:15px system-ui;margin:2em;max-width:60em}text{font:13px system-ui}</style>"
        f"<h1>{html.escape(name)}</h1>"
        f"<h2>Memory of {html.escape(found.rank)} at {html.escape(found.moment)}</h2>{waterfall(held, 'GiB', limit=found.usable / GIB)}"
        f"<h2>Time of a step</h2>{waterfall(times, 'ms')}"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--picture {path} cannot be written ({error.strerror}); choose another file") from None


def waterfall(parts: list[tuple[str, float]], unit: str, *, limit: float = 0.0) -> str:
    """Bars that begin where the one before ended, as SVG; `limit` is drawn as a line."""
    shown = [(name, value) for name, value in parts if value > 0]
    whole = sum(value for _, value in shown)
    scale = 420 / max(whole, limit, 1e-12)
    rows, at = [], 0.0
    for number, (name, value) in enumerate([*shown, ("in all", whole)]):
        start, colour = (at, "#4878a8") if number < len(shown) else (0.0, "#303030")
        y = 26 * number
        rows.append(f'<text x="290" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>')
        rows.append(f'<rect x="{300 + start * scale:.1f}" y="{y + 2}" width="{max(1.0, value * scale):.1f}" height="18" fill="{colour}"/>')
        rows.append(f'<text x="{306 + (start + value) * scale:.1f}" y="{y + 15}">{value:,.2f} {unit}</text>')
        at += value
    height = 26 * (len(shown) + 1)
    if limit:
        x = 300 + limit * scale
        rows.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c03030" stroke-dasharray="4"/>')
    return f'<svg width="820" height="{height}" role="img">{"".join(rows)}</svg>'
