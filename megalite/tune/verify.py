"""`megalite verify`: does this layout compute what one process computes? A table, and an exit code.

In: the user's run config.  Out: loss, gradient norm, worst gradient and worst updated weight over three steps, each beside one process of
plain PyTorch and what the precision allows; bytes sent by kind beside the count of the textbook; memory of a rank.

The layout is proved in fp32, whatever the run's precision: max |a - b| / max |b| of a tensor is within 1e-5 (weights smaller than one step
are measured against a step). A bf16 or fp16 run is then run in that type too: the error of all gradients and of all weights in the 2-norm,
against fp32, is at most twice that of one rank in it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from megalite import models
from megalite.config import Config, Mesh
from megalite.ds_config import read_document
from megalite.fit import resolve_mesh
from megalite.log import open_console, quiet_foreign
from megalite.tune.parity import Answer, Step, assemble, difference, on_mesh, reference
from megalite.tune.shrink import shrink
from megalite.tune.traffic import KINDS, expected, memory

STEPS = 3
TOLERANCE = 1e-5
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # half the distance of 1 to the next number: no error below it says anything


@dataclass(frozen=True)
class Finding:
    """One quantity at its worst over the steps: how far it is off, and how far it may be."""

    what: str
    off: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.off <= self.allowed


def verify(config: Config) -> int:
    """Run both, print the table; 0 when all is within what the precision allows, else 1."""
    quiet_foreign()
    console = open_console()
    document = read_document(config)
    resolve_mesh(config, config.mesh.world)
    small, changes = shrink(config)
    mesh, train = small.mesh, small.train
    resolve_mesh(small, mesh.world)
    stage = document.get("zero_optimization", {}).get("stage", 0)
    layout = f"{_mesh_said(mesh)}, ZeRO-{stage}"
    console.print(f"{config.name}: {layout}, {train.schedule}, {train.precision}", f"shrunk: {', '.join(changes)}", sep="\n")
    try:
        exact = _with_precision(small, "fp32")
        answers = on_mesh(exact, document, steps=STEPS)
        findings = compare(exact, assemble(answers, steps=STEPS))
        if train.precision in ROUNDING:
            findings += compare_rounded(small, assemble(on_mesh(small, document, steps=STEPS), steps=STEPS))
    except AssertionError as error:  # ranks that should hold copies do not
        console.print(f"FAILED: {error}")
        return 1
    console.print(_table(findings))
    console.print(_traffic_table(exact, stage, answers))
    good = all(finding.good for finding in findings)
    console.print("the same numbers as one process" if good else "FAILED: this layout does not compute what one process computes")
    return 0 if good else 1


def _mesh_said(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {degree}" for axis, degree in mesh.degrees.items() if axis != "cp" or degree > 1)


def _with_precision(config: Config, precision: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def compare(config: Config, ours: list[Step]) -> list[Finding]:
    """An fp32 mesh against one process: losses, norms, the worst gradient and the worst updated weight."""
    return _exact(ours, reference(config, steps=len(ours)), models.tied(config.model), rate=config.optimizer.lr)


def compare_rounded(config: Config, ours: list[Step]) -> list[Finding]:
    """A bf16 or fp16 mesh and one such rank, both against fp32: the 2x rule for losses, norms, all gradients and all weights."""
    plain, tied = reference(config, steps=len(ours)), models.tied(config.model)
    one = config.mesh.model_copy(update=dict.fromkeys(config.mesh.degrees, 1))
    train = config.train.model_copy(update={"schedule": "1f1b", "chunks": None, "reduce": None, "sequence_parallel": False})
    alone = assemble(on_mesh(config.model_copy(update={"mesh": one, "train": train}), {}, steps=len(ours)), steps=len(ours))
    found = []
    for what in ("loss", "grad_norm", "gradients", "weights"):
        mine, single, exact = (torch.stack([_vector(step, what, plain[0], tied) for step in run]) for run in (ours, alone, plain))
        off, allowed = (((run - exact).norm() / exact.norm()).item() for run in (mine, single))
        found.append(Finding(f"in {train.precision}: {what.replace('_', ' ')}", off, 2 * max(allowed, ROUNDING[train.precision])))
    return found


def _vector(step: Step, what: str, order: Step, tied: dict[str, str]) -> Tensor:
    """A step's number, or all its tensors end to end in the order of `order`; a copy at the other end of a tie is the same by now."""
    value = getattr(step, what)
    if isinstance(value, float):
        return torch.tensor([value])
    return torch.cat([value[name].flatten() for name in getattr(order, what) if name not in tied])


def _exact(ours: list[Step], plain: list[Step], tied: dict[str, str], *, rate: float) -> list[Finding]:
    found = [_worst("loss", [(abs(a.loss - b.loss) / abs(b.loss), n) for n, (a, b) in enumerate(zip(ours, plain, strict=True))])]
    norms = [(abs(a.grad_norm - b.grad_norm) / b.grad_norm, n) for n, (a, b) in enumerate(zip(ours, plain, strict=True))]
    found.append(_worst("gradient norm", norms))
    for what, least in (("gradients", 1e-30), ("weights", rate)):
        off = []
        for number, (mine, exact) in enumerate(zip(ours, plain, strict=True)):
            a, b = getattr(mine, what), getattr(exact, what)
            missing = b.keys() - a.keys()
            off += [(float("inf"), number, name) for name in missing]
            off += [(difference(value, b[tied.get(name, name)], least=least), number, name) for name, value in a.items()]
        found.append(_worst({"gradients": "worst gradient", "weights": "worst weight"}[what], off))
    return found


def _worst(what: str, off: list[tuple[Any, ...]]) -> Finding:
    value, step, *name = max(off, key=lambda entry: entry[0])
    return Finding(f"{what}: {name[0]}, step {step}" if name else f"{what}, step {step}", value, TOLERANCE)


def _table(findings: list[Finding]) -> Table:
    table = Table("over three steps, beside one process", "off by", "allowed", "")
    for finding in findings:
        table.add_row(finding.what, f"{finding.off:.1e}", f"{finding.allowed:.1e}", "same" if finding.good else "DIFFERENT")
    return table


def _traffic_table(config: Config, stage: int, answers: list[Answer]) -> Table:
    """Bytes a step of all ranks together; the most a rank holds."""
    sent: Counter[str] = sum((answer.sent for answer in answers), Counter())
    wanted = expected(config, stage, [answer.parameters for answer in answers], [answer.whole for answer in answers])
    table = Table("sent a step, all ranks", "KiB", "textbook", title=None)
    for kind in KINDS:
        table.add_row(kind, f"{sent[kind] / 1024:.1f}", _said(*wanted[kind]))
    most = max(answers, key=lambda answer: answer.held)
    table.add_row("held by a rank (weights, gradients, AdamW)", f"{most.held / 1024:.1f}", _said(*memory(config, stage, most.parameters)))
    return table


def _said(least: float, most: float) -> str:
    return f"{least / 1024:.1f}" if least == most else f"{least / 1024:.1f} to {most / 1024:.1f}"
