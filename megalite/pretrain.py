"""What `megalite train` does around the training: shards if there are none yet, ranks, and at the end what came of it.

In: a config.  Out: the run folder, and on the console the validation loss beside the unigram entropy, a sample, where all lies and
what to do next.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from megalite import launch
from megalite.checkpoint import lock
from megalite.checkpoint.manifest import Damaged
from megalite.checkpoint.resume import find as find_checkpoints
from megalite.checkpoint.store import read_facts, whole
from megalite.config import Config, run_folder
from megalite.crew import RankError
from megalite.data.loader import open_train, open_valid, resolve
from megalite.data.shards import unigram_entropy
from megalite.ds_config import read_document
from megalite.errors import UserError
from megalite.evaluate import generate
from megalite.fit import resolve_mesh
from megalite.log import open_console, open_voice, quiet_foreign

LEASE = 120.0  # seconds for which an NFS server may keep the lock of a machine that crashed (90 by default), and a little
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", for whoever requeues jobs


def pretrain(config: Config, *, command: str) -> None:
    """Prepare if need be, train what is left, report."""
    try:
        _pretrain(config, command=command)
    except UserError as error:
        if launch.is_rank_zero():
            launch.record("rank-0", kind="user", report=str(error), culprit=None)
        raise
    except RankError as error:  # of ranks that this process started; one that was joined does not come here
        launch.record(f"rank-{error.rank}", kind="error", report=error.report.splitlines()[-1], culprit=error.rank)
        raise


def _pretrain(config: Config, *, command: str) -> None:
    quiet_foreign()
    config = resolve_mesh(config, launch.count_ranks(config))
    document = read_document(config)  # preparing a corpus takes minutes: what is wrong is said before
    if launch.stands_alone():
        prepare_corpus(config)
    config = complete(config)
    patience = LEASE if launch.is_attended() else 0.0
    with lock.hold(run_folder(config), patience=patience) if launch.is_rank_zero() else nullcontext():
        if launch.is_rank_zero():
            write_config(config)
        if is_finished(config):
            if launch.is_rank_zero():
                launch.record("outcome", kind="finished")
                say(f"{run_folder(config)} has its {config.train.steps} steps: nothing left to train")
        else:
            train_on_ranks(config, _train, document)
    if launch.is_rank_zero():
        report(config, command=command)


def train_on_ranks(config: Config, work: Callable[[Config, int], str | None], document: dict[str, Any]) -> None:
    """Run work(config, rank) on every rank; where it names what asked it to end, say so and exit with UNFINISHED."""
    warm = ("megalite.train", "torch.utils.tensorboard", functools.partial(_check, document))
    if stopped := launch.start(config, work, warm=warm):
        if launch.is_rank_zero():
            say(f"{stopped}: saved, and ended with exit code {UNFINISHED}; the same command goes on from there")
        raise SystemExit(UNFINISHED)


def _check(document: dict[str, Any]) -> None:
    """Whether DeepSpeed knows what the JSON says."""
    from megalite.parallel import zero

    zero.check(document)


def _train(config: Config, rank: int) -> str | None:
    from megalite.train import train  # DeepSpeed takes seconds to import: bad input is answered before that

    quiet_foreign()
    open_voice(rank, own_log=True)
    stopped = train(config, rank)
    if rank == 0:  # here, before the others may leave: the first exit code that is not 0 has srun end everybody
        launch.record("outcome", kind="saved" if stopped else "finished", asked=stopped)
    return stopped


def is_finished(config: Config) -> bool:
    """Whether the last step stands in a checkpoint."""
    done = whole(run_folder(config) / "checkpoints")
    try:
        facts = read_facts(done[-1]) if done else {"step": -1}
        return facts["step"] >= config.train.steps or bool(facts.get("done"))
    except Damaged:  # the ranks take an older one, and say so
        return False


def complete(config: Config) -> Config:
    """Fill in what the shards decide (the vocabulary), check what can be checked before ranks start."""
    opened = open_train(config.data, model=config.model, seed=config.run.seed)
    open_valid(config.data, model=config.model)
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab": opened.vocab_size})})
    find_checkpoints(config, tokenizer=opened.tokenizer.fingerprint if opened.tokenizer else None)
    return config


def write_config(config: Config) -> None:
    """The resolved config into the run folder, where it can be read and run again."""
    folder = run_folder(config)
    fresh = folder / "config.yaml.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        fresh.replace(folder / "config.yaml")
    except OSError as error:
        raise UserError(f"run.folder = {folder} cannot be written ({error.strerror}); choose another run.folder") from None


def prepare_corpus(config: Config) -> None:
    """Make the first training shard from data.corpus where it does not exist and the config says how."""
    data = config.data
    if not data.train or not data.corpus or Path(f"{resolve(data.train[0])}.idx").is_file():
        return
    from megalite.data.prepare import Preparation, prepare  # a third of a second, which no other rank needs

    prepare(
        Preparation(inputs=data.corpus, output=data.train[0], tokenizer=data.corpus_tokenizer or "train:bpe", vocab_size=data.corpus_vocab)
    )


def report(config: Config, *, command: str) -> None:
    """The end of a run, on the console."""
    folder = run_folder(config)
    checkpoint = whole(folder / "checkpoints")[-1]
    valid = read_facts(checkpoint)["valid"]
    held_out = open_valid(config.data, model=config.model)
    if valid and held_out:
        entropy = unigram_entropy(held_out.shards[0])
        say(f"validation loss {valid['tokens']:.3f} nats a token; the unigram entropy of {held_out.shards[0].prefix} is {entropy:.3f}")
    say(sample(config, checkpoint))
    say(f"run folder   {folder}/ (config.yaml, metrics.jsonl, logs/)")
    say(f"checkpoint   {checkpoint}/")
    say(f"resume       {_program('megalite')} {command}   (stopped or killed: it goes on where it was)")
    say(f"curves       {_program('tensorboard')} --logdir {folder}/tensorboard")
    if config.name == "gpt-tiny":
        say(f"train BERT   {_program('megalite')} train bert-tiny")


def _program(name: str) -> str:
    """How to call a program that was installed with this Python: by name where the shell finds it, else by path."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)


def sample(config: Config, checkpoint: Path) -> str:
    """A continuation by a GPT; by a BERT, the words it puts where the validation sample has masks."""
    model, settings = generate.load_model(checkpoint)
    opened = open_train(config.data, model=config.model, seed=config.run.seed)
    tokenizer = opened.tokenizer
    if tokenizer is None:
        return "no sample: the shards name no tokenizer; set data.tokenizer to see one"
    if settings.family == "gpt":
        prompt = torch.from_numpy(opened.source.sample(0)["ids"][:16].copy())
        ids = generate.continue_text(model, prompt, model=settings, tokens=48)
        return f"sample       {json.dumps(tokenizer.decode(prompt.tolist()))} ->\n{tokenizer.decode(ids[len(prompt) :].tolist())}"
    batch = {name: torch.as_tensor(value)[None] for name, value in opened.source.sample(0).items()}
    found, labels = generate.fill_masks(model, batch)[0], batch["labels"][0]
    pairs = [
        (tokenizer.decode([int(labels[at])]), tokenizer.decode([int(found[at])])) for at in torch.nonzero(labels != -100).flatten()[:12]
    ]
    return "sample       masked -> filled in: " + ", ".join(f"{json.dumps(a)} -> {json.dumps(b)}" for a, b in pairs)


def say(line: str) -> None:
    """On the console, plainly."""
    open_console().print(line, markup=False)
