"""A layout between its forms: a row of `Layouts`, words a person writes and reads, a run config with its DeepSpeed JSON.

In: one form.  Out: another. Words are `dp8 tp4 pp2 zero3 micro2 interleaved2 full sp offload`, in any order, with spaces or commas.
"""

from __future__ import annotations

import re
from typing import Any

from megalite.config import CHUNKED, Config, Mesh
from megalite.errors import UserError
from megalite.fit import resolve_mesh
from megalite.tune.layouts import BUCKETS, OFFLOAD, RECOMPUTE, REDUCE, SCHEDULES, Layouts

NUMBERS = {"dp": "dp", "tp": "tp", "pp": "pp", "cp": "cp", "zero": "stage", "micro": "micro", "bucket": "bucket", "live": "live"}
PINS = {
    "mesh.dp": "dp", "mesh.tp": "tp", "mesh.pp": "pp", "mesh.cp": "cp", "train.micro_batch": "micro", "train.chunks": "chunks",
    "train.schedule": "schedule", "train.recompute": "recompute", "train.reduce": "reduce", "train.sequence_parallel": "split_sequence",
}  # fmt: skip
CHOICES = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "reduce": REDUCE, "offload": OFFLOAD}


def pins(overrides: dict[str, Any], config: Config) -> dict[str, int]:
    """Settings that the command line names are kept; the search goes over the rest."""
    found = {}
    for path, column in PINS.items():
        section, leaf = path.split(".")
        if leaf in overrides.get(section, {}):
            value = getattr(getattr(config, section), leaf)
            if value is not None:
                found[column] = CHOICES[column].index(value) if column in CHOICES else int(value)
    return found


def read(words: str, *, batch: int, world: int) -> Layouts:
    """What a person wrote as a layout of one row. Raises UserError for a word that is none."""
    found: dict[str, int] = {"tp": 1, "pp": 1, "cp": 1, "micro": 1, "batch": batch}
    for word in words.replace(",", " ").lower().split():
        match = re.fullmatch(r"([a-z]+)[ =-]?(\d+)", word)
        if match and match[1] in NUMBERS:
            found[NUMBERS[match[1]]] = int(match[2])
        elif match and match[1] in SCHEDULES[2:]:
            found["schedule"], found["chunks"] = SCHEDULES.index(match[1]), int(match[2])
        elif word in SCHEDULES:
            found["schedule"], found["chunks"] = SCHEDULES.index(word), CHUNKED.get(word, 1)
        elif word in RECOMPUTE:
            found["recompute"] = RECOMPUTE.index(word)
        elif word == "sp":
            found["split_sequence"] = 1
        elif word in ("offload", "offload-parameters"):
            found["offload"] = 2 if word.endswith("parameters") else 1
        elif word == "step":
            found["reduce"] = 1
        else:
            known = ", ".join([*(f"{name}N" for name in NUMBERS), *SCHEDULES, *RECOMPUTE, "sp", "step", "offload", "offload-parameters"])
            raise UserError(f"--explain: {word!r} is no part of a layout; write for instance dp8 tp4 zero3 micro2, from {known}")
    found.setdefault("dp", max(1, world // (found["tp"] * found["pp"] * found["cp"])))
    return Layouts.of(**found)


def say(row: dict[str, int]) -> str:
    """The layout in the words that `read` takes; what is plain is left out."""
    words = [f"{axis}{row[axis]}" for axis in ("dp", "tp", "pp", "cp") if row[axis] > 1 or axis == "dp"]
    words += [f"zero{row['stage']}", f"micro{row['micro']}"]
    if row["pp"] > 1:
        words.append(SCHEDULES[row["schedule"]] + (f"{row['chunks']}" if row["chunks"] > 1 else ""))
    words += [RECOMPUTE[row["recompute"]]] if row["recompute"] else []
    words += ["sp"] * row["split_sequence"] + ["step"] * row["reduce"]
    words += [["", "offload", "offload-parameters"][row["offload"]]] if row["offload"] else []
    return " ".join(words)


def as_config(config: Config, row: dict[str, int], *, deepspeed: str | None = None) -> Config:
    """The run in that layout; unchecked, see `why_not`."""
    chunked = SCHEDULES[row["schedule"]] in CHUNKED
    train = {
        "micro_batch": row["micro"],
        "global_batch": row["batch"],
        "schedule": SCHEDULES[row["schedule"]],
        "chunks": row["chunks"] if chunked else None,
        "reduce": REDUCE[1] if row["reduce"] else None,
        "recompute": RECOMPUTE[row["recompute"]],
        "recompute_layers": None,
        "sequence_parallel": bool(row["split_sequence"]),
    }
    mesh = Mesh(dp=row["dp"], pp=row["pp"], cp=row["cp"], tp=row["tp"])
    return config.model_copy(update={"mesh": mesh, "train": config.train.model_copy(update=train), "deepspeed": deepspeed})


def document(row: dict[str, int], config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of that layout."""
    stage, bucket = row["stage"], row["bucket"]
    zero: dict[str, Any] = {"stage": stage}
    if stage < 2:
        zero["reduce_bucket_size"] = min(BUCKETS)  # what travels at once, and is in place: parallel/sums.py
    else:
        zero |= {"overlap_comm": True, "reduce_bucket_size": bucket}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = max(BUCKETS)
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": row["live"],
            "stage3_max_reuse_distance": row["live"],
        }
    if row["offload"]:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if row["offload"] == OFFLOAD.index("parameters"):
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}


def why_not(config: Config, row: dict[str, int]) -> str:
    """Why `megalite train` would refuse the layout; empty where it would not."""
    try:
        resolve_mesh(as_config(config, row), row["dp"] * row["tp"] * row["pp"] * row["cp"])
    except UserError as error:
        return str(error)
    return ""
