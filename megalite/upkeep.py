"""Sections of a run's config that keep it going: what is said and saved when, and what happens when something goes wrong.

`Section` is what every section of the config is; `config.py` puts them all together.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from megalite.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)

    def given(self) -> list[str]:
        """The settings that are not what they are when left out."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if name in self.model_fields_set and getattr(self, name) != field.default
        ]

    def refuse(self, form: str, *, but: Collection[str]) -> None:
        """Raise UserError for a setting that was given, of which `form` reads only some."""
        for name in self.given():
            if name not in but:
                raise UserError(f"--{name.replace('_', '-')} = {_say(getattr(self, name))} is of no use to {form}; leave it out")

    def require(self, **others: str) -> None:
        """Raise UserError for a setting that was given without the other one, for which alone it is."""
        for name in self.given():
            if (other := others.get(name)) and not getattr(self, other):
                flag, needed = name.replace("_", "-"), other.replace("_", "-")
                raise UserError(f"--{flag} = {_say(getattr(self, name))} is for --{needed} alone; give that, too, or leave --{flag} out")


def _say(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class Log(Section):
    every: PositiveInt = 10
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


class Checkpoint(Section):
    every: NonNegativeInt = 500
    """Steps between two checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none does."""
    keep_best: bool = False
    """The checkpoint with the lowest validation loss stays, too; only one that was validated at its own step can be it."""
    background: bool = True
    """Copy what must be saved, train on, and write meanwhile (a copy of weights and moments in host memory); else wait for the disk."""
    stage: str | None = None
    """Folder on a disk of each node: the step waits until a save lies there, and it is copied to the run folder meanwhile. Takes the place
    of the copy in host memory."""
    resume: str = "auto"
    """auto: the newest whole checkpoint of the run folder; none: refuse a folder that holds some; PATH: that checkpoint."""

    def model_post_init(self, _: Any) -> None:
        if self.stage and not self.background:
            raise UserError(f"checkpoint.stage = {self.stage} is copied in the background, and checkpoint.background = false; drop one")


class Watch(Section):
    hang: NonNegativeInt = 120
    """Seconds without a sign of life after which a rank is taken for hung and the run ends, naming it; 0: nobody watches."""
    bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """When a loss or gradient norm is not finite, or is a spike. stop: end the run; skip: leave that update out; rewind: go back to the
    last checkpoint and leave out the batches since."""
    spike: NonNegativeFloat = 0.0
    """A loss or gradient norm of more than this many times the median of the last `window` steps is a spike; 0: none is."""
    window: PositiveInt = 64
    """Steps that a spike is measured against; as many must have passed first."""
    allowed: PositiveInt = 10
    """Updates in a row that may be left out, or times the run may go back, before it ends."""
