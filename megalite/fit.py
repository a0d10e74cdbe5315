"""Does a run fit its mesh, and is every setting of use in it? Every number that must divide another is checked here, before a rank is
started.

In: a `Config` and the number of ranks.  Out: the config with mesh.dp filled in, or a UserError that names both numbers and the cure.
"""

from __future__ import annotations

import math

from megalite.config import CHUNKED, Config
from megalite.errors import UserError

READ = (  # settings that are read in some runs alone: in which, and how that is said
    ("model", "rope_base", lambda config: config.model.positions == "rope", "model.positions = rope"),
    ("data", "whole_word", lambda config: config.model.family == "bert", "model.family = bert"),
    ("data", "mask_fraction", lambda config: config.model.family == "bert", "model.family = bert"),
    ("data", "corpus_tokenizer", lambda config: config.data.corpus, "data.corpus"),
    ("data", "corpus_vocab", lambda config: config.data.corpus, "data.corpus"),
    ("optimizer", "decay_fraction", lambda config: config.optimizer.schedule == "wsd", "optimizer.schedule = wsd"),
    ("watch", "window", lambda config: config.watch.spike, "watch.spike"),
    ("watch", "allowed", lambda config: config.watch.bad_step != "stop", "watch.bad_step = skip or rewind"),
)


def resolve_mesh(config: Config, world: int) -> Config:
    """Fill in mesh.dp for `world` ranks and check everything that depends on the mesh.

    Raises UserError naming both numbers and the cure.
    """
    mesh = config.mesh
    dp = mesh.dp or max(1, world // mesh.world)
    mesh = mesh.model_copy(update={"dp": dp})
    if mesh.world != world:
        degrees = {axis: degree for axis, degree in mesh.degrees.items() if axis != "cp" or degree > 1}
        product = f"mesh {'*'.join(degrees)} = {'*'.join(map(str, degrees.values()))} = {mesh.world}"
        change = ", ".join(f"mesh.{axis}" for axis in list(degrees)[:-1])
        raise UserError(f"{product}, but {world} ranks were started; start {mesh.world} or change {change} or mesh.tp")
    config = config.model_copy(update={"mesh": mesh})
    _check_use(config)
    _check_heads(config)
    _check_stages(config)
    _check_compile(config)
    _check_batch(config)
    _check_sequence(config)
    _check_head(config)
    if config.model.vocab is not None and config.model.vocab < mesh.tp:
        raise UserError(f"model.vocab = {config.model.vocab} is smaller than mesh.tp = {mesh.tp}; lower mesh.tp")
    if config.model.vocab is not None and config.model.vocab // mesh.tp < config.train.loss_pieces:
        words = config.model.vocab // mesh.tp
        raise UserError(
            f"train.loss_pieces = {config.train.loss_pieces} is more than a rank's {words} words of the vocabulary; lower train.loss_pieces"
        )
    return config


def _check_use(config: Config) -> None:
    """No setting is accepted and ignored."""
    for section, name, is_read, where in READ:
        part = getattr(config, section)
        if name in part.given() and not is_read(config):
            raise UserError(f"{section}.{name} = {getattr(part, name)} is read with {where} alone; set that, or leave {section}.{name} out")


def _check_heads(config: Config) -> None:
    mesh, model = config.mesh, config.model
    for what, value in (("model.heads", model.heads), ("model.kv_heads", model.num_kv_heads)):
        if value % mesh.tp:
            raise UserError(f"{what} = {value} is not divisible by mesh.tp = {mesh.tp}; lower mesh.tp to a divisor of {value}")
    if model.heads % (mesh.tp * mesh.cp):
        raise UserError(
            f"model.heads = {model.heads} is not divisible by mesh.tp x mesh.cp = {mesh.tp} x {mesh.cp}, "
            f"but context-parallel ranks share out the heads; lower mesh.cp to a divisor of {model.heads // mesh.tp}"
        )


def _check_stages(config: Config) -> None:
    mesh, model, train = config.mesh, config.model, config.train
    if train.chunks and train.schedule not in CHUNKED:
        raise UserError(
            f"train.chunks = {train.chunks} is for train.schedule = {' or '.join(CHUNKED)}, this one is {train.schedule}; "
            "leave one of them out"
        )
    if train.schedule in CHUNKED and mesh.pp == 1:
        raise UserError(f"train.schedule = {train.schedule} needs several stages, but mesh.pp = 1; raise mesh.pp or use 1f1b")
    if train.recompute_layers and train.recompute == "none":
        raise UserError(f"train.recompute_layers = {train.recompute_layers} is of no use with train.recompute = none; set train.recompute")
    needed, there = mesh.pp * config.num_chunks, model.layers + 2
    if needed > there:
        chunks = f" x {config.num_chunks} chunks" if config.num_chunks > 1 else ""
        raise UserError(f"mesh.pp = {mesh.pp} stages{chunks}, but {model.layers} blocks, embedding and head make {there}; lower mesh.pp")


def _check_compile(config: Config) -> None:
    mesh, train = config.mesh, config.train
    if train.compile and mesh.tp * mesh.cp > 1:
        cut = f"mesh.tp = {mesh.tp}" if mesh.tp > 1 else f"mesh.cp = {mesh.cp}"
        raise UserError(f"train.compile = true is for blocks that no other rank has a part of, but {cut}; leave one of them out")
    if train.compile and train.schedule == "zerobubble":
        raise UserError("train.schedule = zerobubble halves backward passes, which train.compile = true makes whole; leave one of them out")
    if train.compile and train.recompute == "selective":
        raise UserError("train.recompute = selective cannot see into blocks of train.compile = true; use full or none, or do not compile")


def _check_batch(config: Config) -> None:
    mesh, train = config.mesh, config.train
    dp = mesh.dp or 1
    if train.global_batch % (dp * train.micro_batch):
        raise UserError(
            f"train.global_batch = {train.global_batch} is not divisible by mesh.dp x train.micro_batch = {dp} x {train.micro_batch}; "
            f"choose a multiple of {dp * train.micro_batch}"
        )
    microbatches = train.global_batch // (dp * train.micro_batch)
    made = f"{microbatches} microbatches (global_batch {train.global_batch} / dp {dp} / micro_batch {train.micro_batch})"
    if train.schedule == "1f1b" and microbatches < mesh.pp:
        raise UserError(f"{made} cannot fill mesh.pp = {mesh.pp} stages under 1f1b; raise train.global_batch or lower train.micro_batch")
    if train.schedule in ("interleaved", "zerobubble") and microbatches % max(1, microbatches // mesh.pp):
        raise UserError(f"{made} are no equal rounds of about mesh.pp = {mesh.pp}, which {train.schedule} needs; change train.global_batch")


def _check_head(config: Config) -> None:
    if config.model.head != "pretrain":
        for name, degree in config.sequence_parts.items():
            if degree > 1:
                raise UserError(
                    f"model.head = {config.model.head} judges whole sequences, but {name} = {degree} ranks would split them; "
                    "set mesh.cp to 1 and leave train.sequence_parallel out"
                )


def _check_sequence(config: Config) -> None:
    mesh, model, data = config.mesh, config.model, config.data
    if data.sequence and data.sequence > model.sequence:
        raise UserError(f"data.sequence = {data.sequence} is longer than model.sequence = {model.sequence}; lower data.sequence")
    name, sequence = ("data.sequence", data.sequence) if data.sequence else ("model.sequence", model.sequence)
    if config.train.sequence_parallel and mesh.tp == 1:
        raise UserError("train.sequence_parallel cuts sequences over tensor-parallel ranks, but mesh.tp = 1; raise mesh.tp")
    parts = config.sequence_parts
    if sequence % math.prod(parts.values()):
        product, degrees = " x ".join(parts), " x ".join(map(str, parts.values()))
        raise UserError(
            f"{name} = {sequence} is not divisible by {product} = {degrees}, over which sequences are split; "
            f"choose a multiple of {math.prod(parts.values())}"
        )
