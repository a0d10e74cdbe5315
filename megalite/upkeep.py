"""Sections of a run's config that keep it going: what is saved when, and what happens when something goes wrong.

`Section` is what every section of the config is; `config.py` puts them all together.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


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
    resume: str = "auto"
    """auto: the newest whole checkpoint of the run folder; none: refuse a folder that holds some; PATH: that checkpoint."""
