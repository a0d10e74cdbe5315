"""`megalite tune`: which layout, will it fit, how fast will it be; before a GPU is rented.

In: a run, a cluster, and what is asked.  Out: a ranked table with the reasons against the neighbours, and when asked a DeepSpeed JSON, a
run file and the launch line; one layout explained; predictions scored against a table of measured runs. No torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import yaml
from pydantic import NonNegativeInt, PositiveInt
from rich.table import Table

from megalite import config as settings
from megalite.config import Config
from megalite.errors import UserError
from megalite.hardware import GIB
from megalite.log import open_console
from megalite.tune import choices, cluster, confirm, explain, runtime, scoring, search
from megalite.tune.cases import OnSlurm, start_here
from megalite.tune.shape import Shape
from megalite.upkeep import Section

LEFT_OUT = {  # settings of a run that the closed form does not count, or not wholly: their plain value, and what others make of it
    ("model", "attention_dropout"): (0.0, "more time"),
    ("data", "document_mask"): (False, "less time"),
    ("train", "compile"): (False, "less time, other activations"),
}


class Tuning(Section):
    run: tuple[str, ...] = ()
    """A recipe or run file; flags of the run (--mesh.tp 4, --train.precision fp32) are kept as given and not searched over."""
    cluster: str | None = None
    """NODESxGPUSxKIND (8x8xH100), `here` (this machine; 8xhere: eight ranks of it), or a YAML file with the keys of clusters.yaml."""
    global_batch: PositiveInt | None = None
    """Sequences of an optimizer step; left out: train.global_batch."""
    sequence: PositiveInt | None = None
    """Tokens of a sample; left out: data.sequence or model.sequence."""
    top: PositiveInt = 5
    """Layouts in the table."""
    write: str | None = None
    """Write the best layout: FILE.json for DeepSpeed, and beside it FILE.yaml, the run."""
    explain: str | None = None
    """Account for one layout, by its place in the table or in words (`dp8 tp4 pp2 zero3 micro2 sp`): memory as a waterfall, time by
    part."""
    picture: str | None = None
    """With explain: the same as a picture, FILE.html."""
    dry_run: bool = False
    """Build rank 0 of the best layouts with the real engine on fake tensors: exact memory, FLOPs and collectives; takes a minute or so
    each."""
    trials: NonNegativeInt = 0
    """Run the best layouts for 15 steps each, until so many have run, and rank anew after each: here, or with slurm on the cluster. With
    score: how good a layout so many trials would have found in each cell of the table."""
    slurm: str | None = None
    """With trials: run each as a SLURM job, by this profile (a name of slurm/profiles, or a .yaml file)."""
    timeout: PositiveInt = 1800
    """Seconds that a trial may take."""
    output: str = "runs/tune"
    """With trials: the folder for what was measured; started again, it is taken over."""
    score: str | None = None
    """A CSV of measured runs: how far off are predictions? No run is needed."""
    runtime: Literal["megalite", "nanotron", "megatron-deepspeed", "fsdp"] = "megalite"
    """Whose runs the table has."""
    hold_out: bool = False
    """With score: predict each run with constants fitted to the rest of the table."""
    fit: bool = False
    """With score: print the constants that the table gives, as constants.yaml holds them."""


def tune(asked: Tuning, overrides: dict[str, Any], *, on_slurm: OnSlurm | None = None) -> int:
    """What was asked; `overrides` are the flags of the run, `on_slurm` serves --slurm. Returns the exit code."""
    if asked.cluster is None:
        raise UserError(f"megalite tune needs --cluster NODESxGPUSxKIND, for instance 8x8xH100; kinds are {', '.join(cluster.table())}")
    _check(asked, overrides)
    machines = cluster.find(asked.cluster)
    if asked.score:
        known = runtime.find(asked.runtime, kind=machines.kind)
        return scoring.score_table(asked.score, machines, known, held_out=asked.hold_out, fitted=asked.fit, played=asked.trials)
    if len(asked.run) != 1:
        raise UserError(f"megalite tune needs one recipe ({', '.join(settings.recipes())}) or run file; {len(asked.run)} were given")
    config = _read_run(asked, overrides)
    found = search.search(config, machines, runtime.find("megalite", kind=machines.kind), pinned=choices.pins(overrides, config))
    rows = found.best(asked.top)
    console = open_console()
    if not rows:
        _say_nothing_fits(found)
    console.print(_headline(found), _table(found, rows), sep="\n")
    for line in left_out(config):
        console.print(line, markup=False)
    for neighbour in search.neighbours(found, rows[0]):
        console.print(f"  {neighbour.words:44s} {neighbour.reason}", markup=False)
    if asked.explain:
        layouts, name = _asked_layout(asked.explain, found, rows)
        account = explain.account(config, layouts, found)
        console.print("", explain.tables(account, name), sep="\n")
        if asked.picture:
            explain.draw(account, name, Path(asked.picture))
            console.print(f"picture      {asked.picture}", markup=False)
    if asked.dry_run:
        from megalite.tune import rehearsal  # imports torch

        rehearsal.rehearse(found, rows[: asked.top])
    best = _try(asked, found, on_slurm=on_slurm) if asked.trials else rows[0]
    if best is None:
        return 1
    if asked.write:
        for line in write(found, best, Path(asked.write), source=asked.run[0]):
            console.print(line, markup=False)
    return 0


def _check(asked: Tuning, overrides: dict[str, Any]) -> None:
    """Nothing is asked for that would not be done."""
    if asked.score:
        if asked.run:
            raise UserError(f"{asked.run[0]} is of no use to --score, which predicts a table of runs; leave it out")
        asked.refuse("--score, which predicts a table of runs", but=("cluster", "score", "runtime", "hold_out", "fit", "trials"))
        if overrides:
            raise UserError(f"--{next(iter(overrides))}... is of no use to --score, which predicts a table of runs; leave it out")
    asked.require(runtime="score", hold_out="score", fit="score", slurm="trials", timeout="trials", output="trials", picture="explain")
    if asked.write and not asked.write.endswith(".json"):
        raise UserError(f"--write {asked.write} is the name of a DeepSpeed JSON; let it end in .json")
    if asked.picture and not asked.picture.endswith(".html"):
        raise UserError(f"--picture {asked.picture} is a page; let it end in .html")


def _try(asked: Tuning, found: search.Found, *, on_slurm: OnSlurm | None) -> int | None:
    """Measure, tell, and return the row that was the fastest; None where nothing ran."""
    machines, console = found.cluster, open_console()
    start = on_slurm(asked.slurm, machines.nodes, machines.gpus) if asked.slurm and on_slurm else start_here
    if not asked.slurm:
        from megalite.tune import here  # imports torch

        if reason := here.why_not_here(machines):
            raise UserError(f"--trials {asked.trials}: {reason}; give --slurm PROFILE, or --cluster here")

    def put(row: int, folder: Path) -> Path:
        write(found, row, folder / "zero.json", source=asked.run[0])
        return folder / "zero.yaml"

    console.print("")
    hunt, rows = confirm.confirm(
        found, trials=asked.trials, folder=Path(asked.output), timeout=asked.timeout, start=start, write=put,
        say=lambda text: console.print(text, markup=False),
    )  # fmt: skip
    console.print(confirm.table(found, hunt, rows))
    best = hunt.best()
    if best is None:
        console.print("no layout ran; output.log in the folder of each trial says why", markup=False)
        return None
    after = confirm.learned(found, hunt)
    console.print(f"ranked anew; constants: {after.runtime.fitted}", _table(after, after.best(asked.top)), sep="\n")
    console.print(f"measured best  {choices.say(found.judged.layouts.row(rows[best]))}", markup=False)
    return rows[best]


def _read_run(asked: Tuning, overrides: dict[str, Any]) -> Config:
    more: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in overrides.items()}
    if asked.global_batch:
        more.setdefault("train", {})["global_batch"] = asked.global_batch
    if asked.sequence:
        more.setdefault("data", {})["sequence"] = asked.sequence
        given = settings.load(asked.run[0], overrides=overrides).model.sequence
        more.setdefault("model", {}).setdefault("sequence", max(asked.sequence, given))
    config = settings.load(asked.run[0], overrides=more)
    if config.model.vocab is None:
        raise UserError(f"{asked.run[0]} leaves model.vocab to the shards, but a layout is judged before them; give --model.vocab")
    return config


def _headline(found: search.Found) -> str:
    config, machines = found.config, found.cluster
    legal, fit = len(found.judged.layouts), len(found.order)
    parameters = int(Shape.of(config).parameters())
    return (
        f"{config.name}: {parameters / 1e9:.2f} B parameters, {config.train.global_batch} x {config.sequence} tokens a step, "
        f"{config.train.precision}, on {machines.world} {machines.gpu.name}\n"
        f"{legal:,} legal layouts, {fit:,} fit; constants: {found.runtime.fitted}"
    )


def left_out(config: Config) -> list[str]:
    """What of this run the closed form does not count, and which way that would go."""
    found = [
        f"{section}.{name} = {value} ({way})"
        for (section, name), (plain, way) in LEFT_OUT.items()
        if (value := getattr(getattr(config, section), name)) != plain
    ]
    return [f"not counted  {', '.join(found)}"] if found else []


def _table(found: search.Found, rows: list[int]) -> Table:
    table = Table("", "layout", "tokens/s a GPU", "80 % interval", "MFU", "GiB of a GPU", "s a step")
    for place, row in enumerate(rows, 1):
        seconds = found.judged.seconds[row]
        rate = found.config.train.global_batch * found.config.sequence / found.cluster.world / seconds
        low, high = search.interval(rate, found.runtime.spread)
        table.add_row(
            f"{place}",
            choices.say(found.judged.layouts.row(row)), f"{rate:,.0f}", f"{low:,.0f} to {high:,.0f}",
            f"{search.mfu(found, seconds):.1%}", f"{found.judged.held[row] / GIB:.1f} of {found.cluster.usable / GIB:.1f}",
            f"{seconds:.3f}",
        )  # fmt: skip
    return table


def _say_nothing_fits(found: search.Found) -> NoReturn:
    judged, room = found.judged, found.cluster.host_memory / GIB
    on_gpu = judged.held <= found.limit
    least = int(
        np.where(on_gpu, judged.host, judged.host.max() + judged.held).argmin()
    )  # of those that fit a GPU, the smallest on its host
    needs = f"{judged.held[least] / GIB:.1f} of {found.cluster.usable / GIB:.1f} GiB, of which {found.limit / GIB:.1f} can be trusted"
    if on_gpu.any():
        needs = f"{judged.host[least] * found.cluster.gpus / GIB:.0f} of {room:.0f} GiB of host memory"
    raise UserError(
        f"none of {len(judged.layouts):,} layouts fits {found.cluster.name}: the smallest is {choices.say(judged.layouts.row(least))} with "
        f"{needs}; take more GPUs, a shorter sequence, or a smaller model"
    )


def _asked_layout(words: str, found: search.Found, rows: list[int]) -> tuple[Any, str]:
    if words.isdigit():
        if not 1 <= int(words) <= len(rows):
            raise UserError(f"--explain {words}, but the table has {len(rows)} layouts; give a place in it, or words")
        one = found.judged.layouts.take([rows[int(words) - 1]])
    else:
        one = choices.read(words, batch=found.config.train.global_batch, world=found.cluster.world)
        if reason := choices.why_not(found.config, one.row(0)):
            raise UserError(f"--explain {words}: {reason}")
        if int(one.world[0]) != found.cluster.world:
            raise UserError(
                f"--explain {words} takes {int(one.world[0])} GPUs, but {found.cluster.name} has {found.cluster.world}; change dp"
            )
    return one, choices.say(one.row(0))


def write(found: search.Found, row: int, path: Path, *, source: str) -> list[str]:
    """The DeepSpeed JSON, the run file beside it, and how to start it. Nothing is written unless both can be."""
    layout = found.judged.layouts.row(row)
    document, run = choices.document(layout, found.config), path.with_suffix(".yaml")
    config = choices.as_config(found.config, layout, deepspeed=str(path))
    files = {path: json.dumps(document, indent=2) + "\n", run: yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            fresh = name.with_name(f"{name.name}.new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(name)
    except OSError as error:
        raise UserError(f"--write {path} cannot be written ({error.strerror}); choose another folder") from None
    nodes, gpus = found.cluster.nodes, found.cluster.gpus
    start = f"megalite train {run}"
    if nodes > 1:
        start = f"srun --nodes {nodes} --ntasks-per-node {gpus} --gpus-per-node {gpus} megalite train {run}"
    return [
        f"deepspeed    {path}",
        f"run          {run}   (of {source}; name the shards with --data.train)",
        f"start        {start} --data.train PREFIX",
    ]
