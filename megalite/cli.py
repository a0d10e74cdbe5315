"""The verbs of `megalite`: what HELP lists, and `cluster`, which batch scripts ask.

In: the command line.  Out: an exit code: 0, 2 for bad input (one line says value, limit and cure), 1 when a rank failed.
A verb's flags are the fields of its settings, `--mesh.tp 4`; help comes from the fields' own docstrings.
"""

from __future__ import annotations

import shlex
import sys
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from megalite import config as settings
from megalite.config import Config
from megalite.errors import UserError
from megalite.flags import near, read_flags

HELP = f"""usage: megalite VERB ...

Pretrain GPT and BERT with DeepSpeed ZeRO-3 together with pipeline and tensor parallelism.

  megalite prepare INPUT... --output PREFIX --tokenizer NAME|FILE|train:bpe|train:wordpiece|train:unigram
      Text into shards: files of token ids that training maps into memory.

  megalite train RECIPE|FILE.yaml [--mesh.tp 4] [--train.steps 50] ...
      Pretrain. The same command again resumes. --dry-run: say what a rank would hold and send, and train nothing.
      Recipes: {", ".join(settings.recipes())}.

  megalite verify RECIPE|FILE.yaml [--mesh.tp 2] [--deepspeed ds_configs/zero3.json] ...
      Run a shrunk model in this layout on CPU ranks, beside one process: are the numbers the same?

  megalite tune RECIPE|FILE.yaml --cluster 8x8xH100 [--write ds_configs/tuned.json] [--explain 1] [--dry-run] ...
      Which layout fits and is fastest there? Predicted, without a GPU.

  megalite bench RECIPE|FILE.yaml [--steps 30] | --sweep FILE.yaml | compare A.json B.json | network
      Tokens a second, FLOP/s, memory, and where the time goes; measured.

  megalite import NAME|FOLDER --output RUN_FOLDER
      A Hugging Face GPT-2, Llama, Mistral, Qwen2 or BERT as step 0 of a run.

  megalite export CHECKPOINT --output FOLDER [--dtype bf16]
      A checkpoint as a Hugging Face model.

  megalite checkpoint ls|verify|show RUN_FOLDER|CHECKPOINT ...
      What checkpoints there are; is every byte what was written; what does one hold.

  megalite submit RECIPE|FILE.yaml [--nodes 8] [--slurm.time 24:00:00] [--slurm.profile mine.yaml] [--print] ...
  megalite submit --sweep FILE.yaml | --chain FILE.yaml
      Train on a SLURM cluster: a run, a sweep of runs, or jobs one after the other.

  megalite jobs [RUN_FOLDER ...]
      How they are: state, step, loss, tokens a second, time left, why one waits or died.

`megalite VERB --help` explains every flag."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {
        "prepare": prepare,
        "train": train,
        "verify": verify,
        "tune": tune,
        "bench": bench,
        "import": import_,
        "export": export,
        "checkpoint": checkpoint,
        "submit": submit,
        "jobs": jobs,
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _say(HELP)
        elif arguments[0] in verbs:
            verbs[arguments[0]](arguments[1:])
        elif arguments[0] == "cluster":  # what batch scripts ask; nobody types it
            cluster(arguments[1:])
        else:
            raise UserError(f"megalite has no verb {arguments[0]!r}{near(arguments[0], list(verbs))}; the verbs are {', '.join(verbs)}")
    except UserError as error:
        _say(f"megalite: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "report"):  # a rank's failure carries its own traceback; anything else is our bug and shows all
            raise
        _say(f"megalite: {error}", file=sys.stderr)
        sys.exit(1)


def prepare(arguments: list[str]) -> None:
    """megalite prepare INPUT... --output PREFIX --tokenizer ..."""
    from megalite.data import prepare as preparing

    preparing.prepare(_read_request("prepare INPUT...", arguments, preparing.Preparation, positional="inputs"))


def train(arguments: list[str]) -> None:
    """megalite train RECIPE|FILE.yaml [--section.field VALUE ...]"""
    dry = "--dry-run" in arguments
    config = _read_run("train", [word for word in arguments if word != "--dry-run"])
    if dry:
        from megalite.tune import rehearsal

        sys.exit(rehearsal.rehearse_run(config))

    from megalite import pretrain
    from megalite.tune import hindsight

    pretrain.pretrain(config, command=shlex.join(["train", *arguments]))
    for line in hindsight.look_back(config):
        _say(line)


def verify(arguments: list[str]) -> None:
    """megalite verify RECIPE|FILE.yaml [--section.field VALUE ...]"""
    config = _read_run("verify", arguments)

    from megalite.tune import verify as verifying

    sys.exit(verifying.verify(config))


def tune(arguments: list[str]) -> None:
    """megalite tune RECIPE|FILE.yaml --cluster NODESxGPUSxKIND [--section.field VALUE ...]"""
    from megalite.tune import tuning

    of_run, own = _part(arguments)
    request = _read_request("tune RECIPE|FILE.yaml --cluster NODESxGPUSxKIND", own, tuning.Tuning, positional="run")
    sys.exit(tuning.tune(request, read_flags(of_run, Config)))


def bench(arguments: list[str]) -> None:
    """megalite bench RECIPE|FILE.yaml [--steps N] [--section.field VALUE ...]"""
    from megalite.tune import benching

    of_run, own = _part(arguments)
    request = _read_request("bench RECIPE|FILE.yaml", own, benching.Benching, positional="what")
    sys.exit(benching.bench(request, read_flags(of_run, Config)))


def _part(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags of a run, which have a section (--mesh.tp 4), and the rest."""
    of_run: list[str] = []
    own: list[str] = []
    into = own
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0]
            into = of_run if "." in name or name == "--deepspeed" else own
        into.append(word)
    return of_run, own


def import_(arguments: list[str]) -> None:
    """megalite import NAME|FOLDER --output RUN_FOLDER"""
    from megalite.convert import importing

    request = _read_request("import NAME|FOLDER", arguments, importing.Import, positional="source")
    path, said = importing.import_model(request)
    for line in (*said, f"checkpoint   {path}/", f"train        megalite train {request.output}/config.yaml --data.train PREFIX"):
        _say(line)


def export(arguments: list[str]) -> None:
    """megalite export CHECKPOINT --output FOLDER"""
    from megalite.convert import exporting

    request = _read_request("export CHECKPOINT", arguments, exporting.Export, positional="checkpoint")
    for line in (*exporting.export_model(request), f"exported     {request.output}/"):
        _say(line)


def checkpoint(arguments: list[str]) -> None:
    """megalite checkpoint ls|verify|show FOLDER ..."""
    from megalite.checkpoint import inspection

    request = _read_request("checkpoint ls|verify|show FOLDER...", arguments, inspection.Inspection, positional="what")
    sys.exit(inspection.run(request, say=_say))


def submit(arguments: list[str]) -> None:
    """megalite submit RECIPE|FILE.yaml [--nodes N] [--slurm.field VALUE ...] ..., or --sweep FILE, or --chain FILE"""
    from megalite.cluster import order
    from megalite.cluster.settings import Batch, Submission

    if any(word.partition("=")[0] in ("--sweep", "--chain") for word in arguments):
        if _asks_help(arguments):
            _explain_flags(Batch, "megalite submit --sweep FILE.yaml | --chain FILE.yaml")
        batch, flags = order.read_batch(read_flags(arguments, Batch))
        if batch.sweep:
            return order.submit_sweep(batch, flags, say=_say, read_run=lambda words: _read_run("train", words))
        return order.submit_chain(batch, flags, say=_say, read=lambda words: (_named("train", words), read_flags(words[1:], Submission)))
    if _asks_help(arguments):
        _explain_flags(Submission, "megalite submit RECIPE|FILE.yaml")
    return order.submit_run(_named("submit", arguments), read_flags(arguments[1:], Submission), say=_say)


def jobs(arguments: list[str]) -> None:
    """megalite jobs [RUN_FOLDER ...]"""
    from megalite.cluster import jobs as showing

    usage = "usage: megalite jobs [RUN_FOLDER ...]; without one, every run of runs/ that was submitted"
    if _asks_help(arguments):
        return _say(usage)
    if any(word.startswith("-") for word in arguments):
        raise UserError(usage)
    return _say(showing.show(arguments))


def cluster(arguments: list[str]) -> None:
    """megalite cluster WORD ...: what the batch scripts ask"""
    from megalite.cluster import answers

    sys.exit(answers.answer(arguments, read_run=lambda words: _read_run("train", words)))


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


def _say(text: str, *, file: Any = None) -> None:
    print(text, file=file)
