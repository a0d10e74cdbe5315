"""What each verb does with the words behind it: it reads its settings, imports what it needs, and does it.

In: words.  Out: what the verb says and does; UserError for words that are wrong. A verb's flags are the fields of its settings,
`--mesh.tp 4`; help comes from the fields' own docstrings. `cluster` is asked by batch scripts alone.
"""

from __future__ import annotations

import shlex
import sys
import typing
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from megalite import config as settings
from megalite.config import Config
from megalite.errors import UserError
from megalite.flags import read_flags, split_flags
from megalite.task import Task

SHORT = {  # of `megalite finetune`
    "--task": "--task.kind", "--from": "--task.start", "--train": "--task.train", "--valid": "--task.valid", "--columns": "--task.columns",
    "--bad-rows": "--task.bad_rows", "--epochs": "--task.epochs", "--output": "--run.folder",
}  # fmt: skip


class FineTuning(Config):
    """A run that is a fine-tuning: what `megalite finetune` reads."""

    task: Task  # type: ignore


def prepare(arguments: list[str]) -> None:
    """megalite prepare INPUT... --output PREFIX --tokenizer ..."""
    from megalite.data import prepare as preparing

    preparing.prepare(_read_request("prepare INPUT...", arguments, preparing.Preparation, positional="inputs"))


def train(arguments: list[str]) -> None:
    """megalite train RECIPE|FILE.yaml [--section.field VALUE ...]"""
    dry = "--dry-run" in arguments
    config = _read_run("train", [word for word in arguments if word != "--dry-run"])
    if config.task is not None:
        raise UserError(f"{arguments[0]} is a fine-tuning (it has a task); run it by megalite finetune {arguments[0]}")
    if dry:
        from megalite.tune import rehearsal

        sys.exit(rehearsal.rehearse_run(config))

    from megalite import pretrain
    from megalite.tune import hindsight

    pretrain.pretrain(config, command=shlex.join(["train", *arguments]))
    for line in hindsight.look_back(config):
        say(line)


def finetune(arguments: list[str]) -> None:
    """megalite finetune [FILE.yaml] --task KIND --from MODEL --train FILE ... [--section.field VALUE ...]"""
    if _asks_help(arguments):
        _explain_flags(FineTuning, "megalite finetune [FILE.yaml] --task KIND --from MODEL --train FILE ...")
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    flags = read_flags([_long(word) for word in arguments[1 if named else 0 :]], FineTuning)
    document = settings.merge(settings.read(named) if named else {}, flags)
    task = document.get("task") or {}
    if missing := [name for name, field in (("task", "kind"), ("from", "start"), ("train", "train")) if not task.get(field)]:
        raise UserError(f"megalite finetune needs --{' --'.join(missing)}; megalite finetune --help explains every flag")

    from megalite import finetune as tuning

    tuning.finetune(document, command=shlex.join(["finetune", *arguments]))


def evaluate(arguments: list[str]) -> None:
    """megalite evaluate MODEL --data FILE|PREFIX [--mesh.tp 2 ...]"""
    from megalite.evaluate import judge

    run, own = split_flags(arguments)
    request = _read_request("evaluate MODEL --data FILE|PREFIX", own, judge.Evaluation, positional="model")
    for line in judge.evaluate(request, read_flags(run, Config)):
        say(line)


def embed(arguments: list[str]) -> None:
    """megalite embed MODEL --data FILE --output FILE.npy"""
    from megalite.evaluate import vectors

    vectors.embed(_read_request("embed MODEL --data FILE", arguments, vectors.Embedding, positional="model"), say=say)


def generate(arguments: list[str]) -> None:
    """megalite generate MODEL --prompt TEXT ..."""
    from megalite.evaluate import text

    text.generate(_read_request("generate MODEL --prompt TEXT", arguments, text.Generation, positional="model"), say=say)


def chat(arguments: list[str]) -> None:
    """megalite chat MODEL"""
    from megalite.evaluate import text

    request = _read_request("chat MODEL", arguments, text.Generation, positional="model")
    text.talk(request, lines=iter(lambda: _ask(sys.stdin), None), say=say)


def _ask(source: Any) -> str | None:
    """A line of the user's; None at the end."""
    if source.isatty():
        sys.stdout.write("> ")
        sys.stdout.flush()
    return source.readline() or None


def verify(arguments: list[str]) -> None:
    """megalite verify RECIPE|FILE.yaml [--section.field VALUE ...]"""
    config = _read_run("verify", arguments)

    from megalite.tune import verify as verifying

    sys.exit(verifying.verify(config))


def tune(arguments: list[str]) -> None:
    """megalite tune RECIPE|FILE.yaml --cluster NODESxGPUSxKIND [--section.field VALUE ...]"""
    from megalite.tune import tuning

    run, own = split_flags(arguments)
    request = _read_request("tune RECIPE|FILE.yaml --cluster NODESxGPUSxKIND", own, tuning.Tuning, positional="run")
    sys.exit(tuning.tune(request, read_flags(run, Config), on_slurm=_on_slurm))


def bench(arguments: list[str]) -> None:
    """megalite bench RECIPE|FILE.yaml [--steps N] [--section.field VALUE ...]"""
    from megalite.tune import benching

    run, own = split_flags(arguments)
    request = _read_request("bench RECIPE|FILE.yaml", own, benching.Benching, positional="what")
    sys.exit(benching.bench(request, read_flags(run, Config), on_slurm=_on_slurm))


def _on_slurm(profile: str, nodes: int, gpus: int | None) -> typing.Any:
    """What runs a measurement on a cluster; see `cluster/measure.py`."""
    from megalite.cluster import measure
    from megalite.cluster.settings import read_site

    return measure.starter(read_site({"profile": profile}), nodes=nodes, gpus=gpus)


def import_(arguments: list[str]) -> None:
    """megalite import NAME|FOLDER --output RUN_FOLDER"""
    from megalite.convert import importing

    request = _read_request("import NAME|FOLDER", arguments, importing.Import, positional="source")
    path, said = importing.import_model(request)
    for line in (*said, f"checkpoint   {path}/", f"train        megalite train {request.output}/config.yaml --data.train PREFIX"):
        say(line)


def export(arguments: list[str]) -> None:
    """megalite export CHECKPOINT --output FOLDER"""
    from megalite.convert import exporting

    request = _read_request("export CHECKPOINT", arguments, exporting.Export, positional="checkpoint")
    for line in (*exporting.export_model(request), f"exported     {request.output}/"):
        say(line)


def checkpoint(arguments: list[str]) -> None:
    """megalite checkpoint ls|verify|show FOLDER ..."""
    from megalite.checkpoint import inspection

    request = _read_request("checkpoint ls|verify|show FOLDER...", arguments, inspection.Inspection, positional="what")
    sys.exit(inspection.run(request, say=say))


def submit(arguments: list[str]) -> None:
    """megalite submit RECIPE|FILE.yaml [--nodes N] [--slurm.field VALUE ...] ..., or --sweep FILE, or --chain FILE"""
    from megalite.cluster import order
    from megalite.cluster.settings import Batch, Submission

    if any(word.partition("=")[0] in ("--sweep", "--chain") for word in arguments):
        if _asks_help(arguments):
            _explain_flags(Batch, "megalite submit --sweep FILE.yaml | --chain FILE.yaml")
        batch, flags = order.read_batch(read_flags(arguments, Batch))
        if batch.sweep:
            return order.submit_sweep(batch, flags, say=say, read_run=lambda words: _read_run("train", words))
        return order.submit_chain(batch, flags, say=say, read=lambda words: (_named("train", words), read_flags(words[1:], Submission)))
    if _asks_help(arguments):
        _explain_flags(Submission, "megalite submit RECIPE|FILE.yaml")
    return order.submit_run(_named("submit", arguments), read_flags(arguments[1:], Submission), say=say)


def jobs(arguments: list[str]) -> None:
    """megalite jobs [RUN_FOLDER ...]"""
    from megalite.cluster import jobs as showing

    usage = "usage: megalite jobs [RUN_FOLDER ...]; without one, every run of runs/ that was submitted"
    if _asks_help(arguments):
        return say(usage)
    if any(word.startswith("-") for word in arguments):
        raise UserError(usage)
    return say(showing.show(arguments))


def cluster(arguments: list[str]) -> None:
    """megalite cluster WORD ...: what the batch scripts ask"""
    from megalite.cluster import answers

    sys.exit(answers.answer(arguments, read_run=lambda words: _read_run("train", words)))


def _long(word: str) -> str:
    """A flag under its full name."""
    name, mark, value = word.partition("=")
    return SHORT.get(name, name) + mark + value if word.startswith("--") else word


Request = TypeVar("Request", bound=BaseModel)


def _read_request(usage: str, arguments: list[str], schema: type[Request], *, positional: str) -> Request:
    """What the flags of a verb say that is no run."""
    if _asks_help(arguments):
        _explain_flags(schema, f"megalite {usage}")
    try:
        return schema.model_validate(read_flags(arguments, schema, positional=positional))
    except ValidationError as error:
        raise UserError(f"{settings.explain(error, schema)}; megalite {usage.split()[0]} --help explains every flag") from None


def _read_run(verb: str, arguments: list[str]) -> Config:
    """The run that a recipe or run file and the flags behind it describe."""
    if _asks_help(arguments):
        named = arguments[0] if not arguments[0].startswith("-") else None
        _explain_flags(Config, f"megalite {verb} {named or 'RECIPE|FILE.yaml'}", default=settings.load(named) if named else None)
    return settings.load(_named(verb, arguments), overrides=read_flags(arguments[1:], Config))


def _named(verb: str, arguments: list[str]) -> str:
    """The recipe or run file in front of the flags."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"megalite {verb} needs a recipe ({', '.join(settings.recipes())}) or a run file (.yaml) before its flags")
    return arguments[0]


def _asks_help(arguments: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def _explain_flags(schema: type[BaseModel], usage: str, *, default: BaseModel | None = None) -> typing.NoReturn:
    tyro.cli(schema, args=["--help"], prog=usage, default=default or tyro.MISSING, config=(tyro.conf.AvoidSubcommands,))  # type: ignore[call-overload]
    raise AssertionError("help exits")


def say(text: str, *, file: Any = None) -> None:
    """Print it."""
    print(text, file=file)
