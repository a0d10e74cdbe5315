"""Sweeps: many runs, each with flags of its own, as the tasks of one array job; and the table of what came of them.

In: a file with the run, flags for all rows, and rows, or a grid of which every combination is a row. Out: FOLDER/sweep.json, a run folder a
row, and a table. A row that cannot run on its nodes is refused before anything is queued and stays in the table with the reason.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import PositiveInt, ValidationError

from megalite.cluster import commands, history, submit
from megalite.cluster.script import render, train_options, train_variables
from megalite.cluster.settings import Site
from megalite.config import Config, explain
from megalite.errors import UserError
from megalite.upkeep import Section

FILE = "sweep.json"
ReadRun = Callable[[list[str]], Config]


class Sweep(Section):
    """A sweep file. `flags` and rows hold settings by their dotted names, optimizer.lr, as the flags of `megalite train` do."""

    run: str
    """A recipe or a run file."""
    folder: str | None = None
    """Where the rows' run folders go; left out: runs/NAME of the sweep file."""
    flags: dict[str, Any] = {}
    """Settings of every row."""
    rows: tuple[dict[str, Any], ...] = ()
    """Settings of each row."""
    grid: dict[str, tuple[Any, ...]] = {}
    """Lists of settings, of which every combination is a row."""
    at_once: PositiveInt | None = None
    """How many rows may run at the same time."""

    def each(self) -> list[dict[str, Any]]:
        """The settings in which rows differ, row by row."""
        combined = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())] if self.grid else [{}]
        return [{**row, **point} for row in self.rows or ({},) for point in combined]


def read(name: str) -> Sweep:
    """A sweep file. Raises UserError for one that is none."""
    try:
        document = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"sweep file {name} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"sweep file {name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"sweep file {name} must be a mapping of run, flags and rows or grid; docs/slurm.md shows one")
    try:
        sweep = Sweep.model_validate({"folder": f"runs/{Path(name).stem}", **document})
    except ValidationError as error:
        raise UserError(f"sweep file {name}: {explain(error, Sweep)}") from None
    if not sweep.rows and not sweep.grid:
        raise UserError(f"sweep file {name} has neither rows nor a grid")
    return sweep


def words(flags: dict[str, Any]) -> list[str]:
    """Settings as the flags of a command line."""
    found = []
    for name, value in flags.items():
        found.append(f"--{name.replace('_', '-')}")
        found += [str(part) for part in value] if isinstance(value, (list, tuple)) else [_word(value)]
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def plan(sweep: Sweep, site: Site, *, nodes: int, read_run: ReadRun) -> list[dict[str, Any]]:
    """The rows: flags, arguments of `megalite train`, and why a row is refused. Raises UserError where no row is left."""
    folder = Path(sweep.folder or ".").absolute()
    rows = []
    for number, own in enumerate(sweep.each()):
        arguments = [sweep.run, *words({**sweep.flags, **own, "run.folder": f"{folder}/row-{number}", "name": f"row-{number}"})]
        try:
            config = read_run(arguments)
            submit.check_mesh(config, site, nodes=nodes)
            submit.check_shards(config)
        except UserError as error:
            refused = str(error)
        else:
            refused = None
        rows.append({"flags": own, "arguments": arguments, "refused": refused})
    if all(row["refused"] for row in rows):
        raise UserError(f"none of {len(rows)} rows can run; the first: {rows[0]['refused']}")
    return rows


def job(sweep: Sweep, rows: list[dict[str, Any]], site: Site, *, nodes: int) -> submit.Job:
    """The array job."""
    submit.check_time(site)
    if site.spares or site.min_nodes:
        raise UserError("slurm.spares and slurm.min_nodes are for a run of its own; a sweep's row waits in the queue again instead")
    folder = Path(sweep.folder or ".").absolute()
    output = folder / history.FOLDER / "%x-%A_%a.out"
    options = train_options(site, name=folder.name, nodes=nodes, output=output, comment=f"{commands.RUN}{folder}")
    numbers = ",".join(str(number) for number, row in enumerate(rows) if not row["refused"])
    options.append(f"--array={numbers}" + (f"%{sweep.at_once}" if sweep.at_once else ""))
    text = render("sweep", site, options=options, variables=train_variables(site, nodes=nodes))
    return submit.Job(text, "sweep", (str(folder),), folder)


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(rows, indent=1))


def load(folder: Path) -> list[dict[str, Any]]:
    """The rows of a sweep. Raises UserError for a folder that holds none."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} holds no sweep ({FILE})")
    return json.loads((folder / FILE).read_text())


def arguments(folder: Path, number: int) -> list[str]:
    """What row `number` hands to `megalite train`."""
    return load(folder)[number]["arguments"]


def table(folder: Path) -> str:
    """A line a row: its settings, how far it is, loss and speed, and why it failed."""
    lines = [("row", "settings", "state", "step", "loss", "tokens/s", "")]
    for number, row in enumerate(load(folder)):
        run = folder / f"row-{number}"
        known, tries = history.last_metrics(run) or {}, history.read(run, history.ATTEMPTS)
        state, why = ("refused", row["refused"]) if row["refused"] else _state(tries, known)
        loss, speed = known.get("loss"), known.get("tokens_per_second")
        settings = shlex.join(f"{name}={value}" for name, value in row["flags"].items())
        numbers = (str(known.get("step", "")), "" if loss is None else f"{loss:.4f}", "" if speed is None else f"{speed:,.0f}")
        lines.append((str(number), settings, state, *numbers, why or ""))
    return align(lines)


def _state(tries: list[dict[str, Any]], known: dict[str, Any]) -> tuple[str, str | None]:
    if not tries:
        return ("running" if known else "waiting"), None
    verdict = tries[-1]["verdict"]
    if verdict in ("give-up", "again"):
        return "failed", tries[-1]["reason"]
    return {"finished": "done", "stopped": "stopped"}.get(verdict, "waiting"), None


def align(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns, each as wide as its widest entry; the last one as it comes."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[-1]]).rstrip() for line in lines
    )
