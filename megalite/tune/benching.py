"""`megalite bench RUN`, `bench --sweep FILE.yaml`, `bench compare A.json B.json`, `bench network`: measured, written down, compared.

In: what is asked.  Out: tables on the console and files of a folder. Each layout of a sweep is a process of its own: one that runs out of
memory, hangs or crashes is a row, and the sweep goes on; started again, it leaves out what it has measured.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml
from pydantic import NonNegativeInt, PositiveInt

from megalite import config as settings
from megalite import launch
from megalite.config import Config
from megalite.errors import UserError
from megalite.log import open_console, quiet_foreign
from megalite.tune import network, report
from megalite.tune.cases import OnSlurm, Start, run_case, start_here
from megalite.upkeep import Section


class Benching(Section):
    what: tuple[str, ...] = ()
    """A recipe or run file; or `compare A.json B.json`; or `network`; or `kernels`."""
    steps: PositiveInt = 30
    """Steps that are measured."""
    warm_up: NonNegativeInt = 5
    """Steps before them that are not."""
    output: str = "runs/bench"
    """Folder for results.json, .csv, .md and .html."""
    sweep: str | None = None
    """A YAML file with `run`, a `grid` of settings with lists of values or a list of `layouts`, and `timeout` in seconds for each."""
    ranks: PositiveInt | None = None
    """With network: ranks to fork on a machine without a GPU; left out: 4."""
    slurm: str | None = None
    """With sweep: measure every layout as a SLURM job, by this profile (a name of slurm/profiles, or a .yaml file)."""
    nodes: PositiveInt | None = None
    """With slurm: nodes a layout is measured on; left out: 1."""


def bench(asked: Benching, overrides: dict[str, Any], *, on_slurm: OnSlurm | None = None) -> int:
    """What was asked; `on_slurm` serves --slurm. Returns the exit code."""
    quiet_foreign()
    _check(asked, overrides)
    if asked.what[:1] == ("compare",):
        if len(asked.what) != 3:
            raise UserError(
                f"megalite bench compare takes two files, but {len(asked.what) - 1} were given; name a results.json before and one after"
            )
        open_console().print(report.compare(report.read(asked.what[1]), report.read(asked.what[2])))
        return 0
    if asked.what == ("network",):
        return network.measure_links(ranks=asked.ranks or 4, folder=Path(asked.output))
    if asked.what == ("kernels",):
        return _bench_kernels(Path(asked.output))
    if asked.sweep:
        return sweep(
            Path(asked.sweep), asked, start=on_slurm(asked.slurm, asked.nodes or 1, None) if asked.slurm and on_slurm else start_here
        )
    if len(asked.what) != 1:
        raise UserError(
            f"megalite bench needs one recipe ({', '.join(settings.recipes())}) or run file, `compare A.json B.json`, "
            "`network` or `kernels`"
        )
    return bench_run(_complete(settings.load(asked.what[0], overrides=overrides), asked), asked)


READ = {  # by each form but a run's
    "compare": ("what",),
    "network": ("what", "ranks", "output"),
    "kernels": ("what", "output"),
    "sweep": ("sweep", "slurm", "nodes", "steps", "warm_up", "output"),
}


def _check(asked: Benching, overrides: dict[str, Any]) -> None:
    """Nothing is asked for that would not be done."""
    form = asked.what[0] if asked.what and asked.what[0] in READ else "sweep" if asked.sweep else ""
    if form == "sweep" and asked.what:
        raise UserError(f"{asked.what[0]} is of no use beside --sweep {asked.sweep}, which names its run; leave it out")
    if form:
        asked.refuse(f"megalite bench {'--' if form == 'sweep' else ''}{form}", but=READ[form])
        if overrides:
            cure = "write it into the file, under flags" if form == "sweep" else "leave it out"
            raise UserError(f"--{next(iter(overrides))}... is of no use to megalite bench {'--' if form == 'sweep' else ''}{form}; {cure}")
    if asked.slurm and not asked.sweep:
        raise UserError(f"--slurm {asked.slurm} measures the layouts of a sweep; give --sweep FILE.yaml, or submit slurm/bench.sbatch")
    asked.require(nodes="slurm")
    if asked.ranks and form != "network":
        raise UserError(f"--ranks {asked.ranks} is for megalite bench network; a run's ranks are those of its mesh")


def _bench_kernels(folder: Path) -> int:
    """The fused kernels beside their peers; refused where there is no GPU for them."""
    from megalite_kernels.bench import main, why_nothing  # pyright: ignore[reportMissingImports]

    if reason := why_nothing():
        raise UserError(f"megalite bench kernels: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    return main(["--output", str(folder / "kernels.json")])


def _complete(config: Config, asked: Benching) -> Config:
    """No shards say the vocabulary, and nothing of a run folder is written but logs."""
    if config.model.vocab is None:
        raise UserError("a benchmark reads no shards, so it must be told the vocabulary; give --model.vocab")
    run = config.run.model_copy(update={"folder": asked.output})
    return config.model_copy(update={"run": run, "train": config.train.model_copy(update={"steps": 1_000_000})})


def bench_run(config: Config, asked: Benching) -> int:
    from megalite.tune.bench import measure

    result = measure(config, steps=asked.steps, warm_up=asked.warm_up)
    if launch.is_rank_zero():
        console = open_console()
        console.print(f"{result['name']} on {result['ranks']} ranks: {result['device']}", markup=False)
        console.print(report.table([result]), report.shares(result), sep="\n")
        for path in report.write([result], Path(asked.output)):
            console.print(f"written      {path}", markup=False)
    return 0


def read_sweep(path: Path) -> tuple[str, list[dict[str, Any]], float]:
    """The run, the settings of every layout, and the time each may take. Raises UserError for a file that says nothing sensible."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--sweep {path} cannot be read ({error.strerror}); name an existing .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--sweep {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or "run" not in document or not ({"grid", "layouts"} & document.keys()):
        raise UserError(f"--sweep {path} needs `run`, and `grid` (settings with lists of values) or `layouts` (a list of settings)")
    if unknown := [key for key in document if key not in ("run", "grid", "layouts", "flags", "timeout")]:
        known = ["run", "grid", "layouts", "flags", "timeout"]
        raise UserError(f"--sweep {path}: {unknown[0]} is no key of a sweep{settings.suggest(unknown[0], known)}")
    common = document.get("flags") or {}
    cases = [dict(layout) for layout in document.get("layouts") or []]
    if grid := document.get("grid"):
        lists = [value if isinstance(value, list) else [value] for value in grid.values()]
        cases += [dict(zip(grid, values, strict=True)) for values in itertools.product(*lists)]
    return str(document["run"]), [{**common, **case} for case in cases], float(document.get("timeout", 1800))


def sweep(path: Path, asked: Benching, *, start: Start) -> int:
    """Measure every layout, one after the other; 0 if at least one ran."""
    run, cases, timeout = read_sweep(path)
    folder, console = Path(asked.output), open_console()
    known = report.read(str(folder / "results.json")) if (folder / "results.json").exists() else []
    results: list[dict[str, Any]] = []
    for number, case in enumerate(cases, 1):
        flags = [word for name, value in case.items() for word in (f"--{name}", _word(value))]
        arguments = [run, *flags, "--steps", str(asked.steps), "--warm-up", str(asked.warm_up)]
        done = next((entry for entry in known if entry.get("arguments") == arguments and entry.get("status") != "lost"), None)
        result = done or run_case(arguments, folder / f"case-{number}", timeout=timeout, start=start)
        results.append({**result, "arguments": arguments})
        report.write(results, folder)
        status = result.get("status", "ok")
        rate = f"{result['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU" if status == "ok" else f"{status}: {result['reason']}"
        console.print(f"{number}/{len(cases)}  {' '.join(flags)}  {rate}{'  (measured before)' if done else ''}", markup=False)
    console.print(report.table(results))
    console.print(f"written      {folder}/results.json, .csv, .md, .html", markup=False)
    return 0 if any(entry.get("status", "ok") == "ok" for entry in results) else 1


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
