"""The verbs: `megalite prepare`, `megalite train`, `megalite verify`, `megalite import`, `megalite export`,
`megalite checkpoint`.

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
from megalite.flags import Tuning, long, near, part, read_flags

HELP = f"""usage: megalite VERB ...

Pretrain GPT and BERT with DeepSpeed ZeRO-3 together with pipeline and tensor parallelism.

  megalite prepare INPUT... --output PREFIX --tokenizer NAME|FILE|train:bpe|train:wordpiece|train:unigram
      Text into shards: files of token ids that training maps into memory.

  megalite train RECIPE|FILE.yaml [--mesh.tp 4] [--train.steps 50] ...
      Pretrain. The same command again resumes.
      Recipes: {", ".join(settings.recipes())}.

  megalite finetune --task classify|regress|tag|translate|chat|lm --from MODEL --train FILE [--valid FILE] [--mesh.tp 2] ...
      A task on a pretrained trunk: a checkpoint of any mesh or a Hugging Face model, and rows of .tsv .csv .jsonl .parquet.

  megalite evaluate MODEL --data FILE|PREFIX [--mesh.tp 2] ...
      Scores of its task, perplexity and bits a byte, on one device or any mesh; as JSON and Markdown.

  megalite embed MODEL --data FILE --output FILE.npy|.parquet [--query TEXT]
      Vectors of texts, and which are alike.

  megalite generate MODEL --prompt TEXT [--temperature 0.8] [--top-p 0.95] ...
      Text from a GPT, as it comes; of a BERT, the words it puts where a mask is.

  megalite chat MODEL
      A conversation, by the tokenizer's chat template.

  megalite verify RECIPE|FILE.yaml [--mesh.tp 2] [--deepspeed ds_configs/zero3.json] ...
      Run a shrunk model in this layout on CPU ranks, beside one process: are the numbers the same?

  megalite import NAME|FOLDER --output RUN_FOLDER
      A Hugging Face GPT-2, Llama, Mistral or BERT as step 0 of a run.

  megalite export CHECKPOINT --output FOLDER [--dtype bf16]
      A checkpoint as a Hugging Face model.

  megalite checkpoint ls|verify|show RUN_FOLDER|CHECKPOINT ...
      What checkpoints there are; is every byte what was written; what does one hold.

`megalite VERB --help` explains every flag."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {
        "prepare": prepare,
        "train": train,
        "finetune": finetune,
        "evaluate": evaluate,
        "embed": embed,
        "generate": generate,
        "chat": chat,
        "verify": verify,
        "import": import_,
        "export": export,
        "checkpoint": checkpoint,
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _say(HELP)
        elif arguments[0] in verbs:
            verbs[arguments[0]](arguments[1:])
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
    config = _read_run("train", arguments)
    if config.task is not None:
        raise UserError(f"{arguments[0]} is a fine-tuning (it has a task); run it by megalite finetune {arguments[0]}")

    from megalite import pretrain

    pretrain.pretrain(config, command=shlex.join(["train", *arguments]))


def finetune(arguments: list[str]) -> None:
    """megalite finetune [FILE.yaml] --task KIND --from MODEL --train FILE ... [--section.field VALUE ...]"""
    if _asks_help(arguments):
        _explain_flags(Tuning, "megalite finetune [FILE.yaml] --task KIND --from MODEL --train FILE ...")
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    flags = read_flags([long(word) for word in arguments[1 if named else 0 :]], Tuning)
    document = settings.merge(settings.read(named) if named else {}, flags)
    task = document.get("task") or {}
    if missing := [name for name, field in (("task", "kind"), ("from", "start"), ("train", "train")) if not task.get(field)]:
        raise UserError(f"megalite finetune needs --{' --'.join(missing)}; megalite finetune --help explains every flag")

    from megalite import finetune as tuning

    tuning.finetune(document, command=shlex.join(["finetune", *arguments]))


def evaluate(arguments: list[str]) -> None:
    """megalite evaluate MODEL --data FILE|PREFIX [--mesh.tp 2 ...]"""
    from megalite.evaluate import judge

    own, others = part(arguments, judge.Evaluation)
    request = _read_request("evaluate MODEL --data FILE|PREFIX", own, judge.Evaluation, positional="model")
    for line in judge.evaluate(request, read_flags(others, Config)):
        _say(line)


def embed(arguments: list[str]) -> None:
    """megalite embed MODEL --data FILE --output FILE.npy"""
    from megalite.evaluate import vectors

    vectors.embed(_read_request("embed MODEL --data FILE", arguments, vectors.Embedding, positional="model"), say=_say)


def generate(arguments: list[str]) -> None:
    """megalite generate MODEL --prompt TEXT ..."""
    from megalite.evaluate import text

    text.generate(_read_request("generate MODEL --prompt TEXT", arguments, text.Generation, positional="model"), say=_say)


def chat(arguments: list[str]) -> None:
    """megalite chat MODEL"""
    from megalite.evaluate import text

    request = _read_request("chat MODEL", arguments, text.Generation, positional="model")
    text.talk(request, lines=iter(lambda: _ask(sys.stdin), None), say=_say)


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
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"megalite {verb} needs a recipe ({', '.join(settings.recipes())}) or a run file (.yaml) before its flags")
    return settings.load(arguments[0], overrides=read_flags(arguments[1:], Config))


def _asks_help(arguments: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def _explain_flags(schema: type[BaseModel], usage: str, *, default: BaseModel | None = None) -> typing.NoReturn:
    tyro.cli(schema, args=["--help"], prog=usage, default=default or tyro.MISSING, config=(tyro.conf.AvoidSubcommands,))  # type: ignore[call-overload]
    raise AssertionError("help exits")


def _say(text: str, *, file: Any = None) -> None:
    print(text, file=file)
