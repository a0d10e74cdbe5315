"""Results of `megalite bench` for people and programs: JSON, CSV, Markdown, and one HTML page with plots that needs nothing else.

In: results, as bench.py makes them, the failed ones too.  Out: files of a folder, written whole or not at all; tables for the console.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from megalite.errors import UserError
from megalite.hardware import GIB

COLUMNS = (
    "name", "layout", "status", "device", "ranks", "step_s", "deviation_s", "tokens_per_second_per_gpu", "tflops_per_gpu",
    "tflops_per_gpu_causal", "mfu", "hfu", "memory_gib", "predicted_step_s", "predicted_memory_gib", "reason",
)  # fmt: skip


def row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a flat line of a table; figures that a failed run has not are None."""
    seconds = result.get("seconds", {})
    memory, known = result.get("memory_bytes"), result.get("predicted") or {}
    flat = {
        **result,
        "status": result.get("status", "ok"),
        "step_s": seconds.get("median"),
        "deviation_s": seconds.get("deviation"),
        "memory_gib": memory / GIB if memory else None,
        "predicted_step_s": known.get("seconds"),
        "predicted_memory_gib": known["memory_bytes"] / GIB if known else None,
    }
    return {name: flat.get(name) for name in COLUMNS}


def write(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """results.json, results.csv, results.md and results.html."""
    rows = [row(result) for result in results]
    texts = {"json": json.dumps(results, indent=1), "csv": _csv(rows), "md": _markdown(rows), "html": page(results)}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            path = folder / f"results.{kind}"
            fresh = path.with_name(f"{path.name}.new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
            written.append(path)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}); choose another folder") from None
    return written


def read(name: str) -> list[dict[str, Any]]:
    """The results of a results.json. Raises UserError for anything else."""
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{name} is no results.json of megalite bench ({error}); name one") from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "layout" in entry for entry in found):
        raise UserError(f"{name} holds no results of megalite bench; name a results.json that it wrote")
    return found


def table(results: list[dict[str, Any]]) -> Table:
    found = Table("layout", "tokens/s a GPU", "TFLOP/s", "MFU", "s a step", "+-", "GiB", "")
    for entry in map(row, results):
        figures = [_said(entry["tokens_per_second_per_gpu"], ",.0f"), _said(entry["tflops_per_gpu"], ".3f"), _said(entry["mfu"], ".1%")]
        figures += [_said(entry["step_s"], ".3f"), _said(entry["deviation_s"], ".3f"), _said(entry["memory_gib"], ".2f")]
        found.add_row(entry["layout"], *figures, "" if entry["status"] == "ok" else f"{entry['status']}: {entry['reason']}")
    return found


def shares(result: dict[str, Any]) -> Table:
    found = Table("where the time of a step goes, rank 0", "share")
    for name, share in result["shares"].items():
        found.add_row(name, f"{share:.1%}")
    return found


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Table:
    """Layouts that both have; a difference smaller than the spread of the steps is called none."""
    found = Table("layout", "tokens/s a GPU before", "after", "change", "GiB before", "after")
    known = {(entry["name"], entry["layout"]): entry for entry in before if entry.get("status", "ok") == "ok"}
    both = 0
    for entry in after:
        old = known.get((entry.get("name"), entry["layout"]))
        if old is None or entry.get("status", "ok") != "ok":
            continue
        both += 1
        a, b = old["tokens_per_second_per_gpu"], entry["tokens_per_second_per_gpu"]
        spread = sum(run["seconds"]["deviation"] / run["seconds"]["median"] for run in (old, entry))
        change = f"{b / a - 1:+.1%}" if abs(b / a - 1) > spread else f"{b / a - 1:+.1%}, within the spread of {spread:.1%}"
        found.add_row(
            f"{entry['name']}: {entry['layout']}", f"{a:,.0f}", f"{b:,.0f}", change, f"{old['memory_bytes'] / GIB:.2f}",
            f"{entry['memory_bytes'] / GIB:.2f}",
        )  # fmt: skip
    if not both:
        raise UserError("the two files have no layout in common that ran in both; compare results of the same runs")
    return found


def page(results: list[dict[str, Any]]) -> str:
    """Plots and the table, self-contained."""
    good = [entry for entry in results if entry.get("status", "ok") == "ok"]
    rate = [(f"{entry['name']}: {entry['layout']}", entry["tokens_per_second_per_gpu"]) for entry in good]
    parts = [f"<h2>Tokens a second and GPU</h2>{bars(rate, '')}" if rate else ""]
    parts += [_scaling(good), _foretold(good)]
    for entry in good:
        named = [(name, 100 * share) for name, share in entry["shares"].items()]
        parts.append(f"<h3>{html.escape(entry['layout'])}: where the time goes</h3>{bars(named, '%')}")
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_said(value, '.4g'))}</td>" for value in row(entry).values()) + "</tr>" for entry in results
    )
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    style = (
        "body{font:15px system-ui;margin:2em}td,th{padding:2px 8px;border-bottom:1px solid #ccc;text-align:left}text{font:13px system-ui}"
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>megalite bench</title><style>{style}</style><h1>megalite bench</h1>"
        f"{''.join(parts)}<h2>All runs</h2><table><tr>{heads}</tr>{lines}</table>"
    )


def _scaling(good: list[dict[str, Any]]) -> str:
    """Each model's tokens a second and GPU over those of its fewest ranks."""
    found = []
    for name in sorted({entry["name"] for entry in good}):
        runs = [entry for entry in good if entry["name"] == name]
        best = {ranks: max(e["tokens_per_second_per_gpu"] for e in runs if e["ranks"] == ranks) for ranks in {e["ranks"] for e in runs}}
        if len(best) > 1:
            base = best[min(best)]
            found += [(f"{name} on {ranks}", 100 * value / base) for ranks, value in sorted(best.items())]
    return f"<h2>Scaling efficiency, best layout of each size</h2>{bars(found, '%')}" if found else ""


def _foretold(good: list[dict[str, Any]]) -> str:
    """Predicted step times across, measured ones up, on logarithmic axes of one scale: a good prediction lies on the line."""
    known = [(entry, entry["predicted"]) for entry in good if entry.get("predicted")]
    if not known:
        return ""
    seen = [value for entry, said in known for value in (entry["seconds"]["median"], said["low"], said["high"])]
    low, high = math.log(min(seen)) - 0.1, math.log(max(seen)) + 0.1

    def at(seconds: float) -> float:
        return 400 * (math.log(seconds) - low) / (high - low)

    marks = ['<rect width="400" height="400" fill="none" stroke="#ccc"/><path d="M0 400L400 0" stroke="#999" stroke-dasharray="4"/>']
    for entry, said in known:
        truth, x = entry["seconds"]["median"], at(said["seconds"])
        y = 400 - at(truth)
        name = f"{entry['name']}: {entry['layout']}: {truth:.4g} s, predicted {said['seconds']:.4g}"
        marks.append(
            f'<g><title>{html.escape(name)}</title><path d="M{at(said["low"]):.1f} {y:.1f}H{at(said["high"]):.1f}" stroke="#4878a8"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#4878a8"/></g>'
        )
    ends = "".join(
        f'<text x="{x}" y="418" text-anchor="{side}">{math.exp(value):.3g} s</text>'
        for x, side, value in ((0, "start", low), (400, "end", high))
    )
    off = [(f"{entry['name']}: {entry['layout']}", 100 * said["seconds"] / entry["seconds"]["median"]) for entry, said in known]
    fitted = html.escape("; ".join(sorted({said["constants"] for _, said in known})))
    return (
        "<h2>Predicted against measured</h2><p>Seconds a step: predicted across, with the 80 % interval, and measured up.</p>"
        f'<svg width="420" height="430" role="img">{"".join(marks)}{ends}</svg><h3>Predicted over measured</h3>{bars(off, "%")}'
        f"<p>Constants: {fitted}</p>"
    )


def bars(values: list[tuple[str, float]], unit: str) -> str:
    """A bar chart as SVG."""
    scale = 420 / max([value for _, value in values] + [1e-12])
    rows = []
    for number, (name, value) in enumerate(values):
        y = 26 * number
        rows.append(f'<text x="390" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>')
        rows.append(f'<rect x="400" y="{y + 2}" width="{max(1.0, value * scale):.1f}" height="18" fill="#4878a8"/>')
        rows.append(f'<text x="{406 + value * scale:.1f}" y="{y + 15}">{value:,.4g} {unit}</text>')
    return f'<svg width="920" height="{26 * len(values)}" role="img">{"".join(rows)}</svg>'


def _said(value: Any, form: str) -> str:
    return "" if value is None else format(value, form) if isinstance(value, (int, float)) else str(value)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_said(value, ".4g").replace("|", "/") for value in entry.values()) + " |" for entry in rows]
    return "\n".join(lines) + "\n"
