"""Bad steps: a loss or gradient norm that is not finite, or a spike; the run ends, leaves the update out, or goes back.

In: loss and norm of every step, the same on every rank.  Out: a verdict, the same on every rank, and the few numbers that a resumed run
must know to judge alike. Going back to a checkpoint and leaving out the batches since is PaLM's rule (Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1), leaving out an update OLMo 2's (arXiv:2501.00656).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median
from typing import Any

from megalite.errors import UserError
from megalite.upkeep import Watch

LOG = logging.getLogger(__name__)
CURE = "lower optimizer.lr or train.clip, or raise optimizer.warmup, and run again: it resumes from the last checkpoint"


class Rewind(Exception):
    """Step `step` (from 1) was bad, for this reason; its update is in the weights."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class Guard:
    """Judges steps. Step n of the run takes batch n + `shift`; `skipped` updates were left out, `rewound` times the run went back."""

    def __init__(self, settings: Watch) -> None:
        self.settings = settings
        self.shift = self.skipped = self.rewound = self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.norms: deque[float] = deque(maxlen=settings.window)

    def refuses(self, norm: float) -> bool:
        """Whether to leave out the update whose gradients have this norm. Raises UserError when too many were, in a row."""
        reason = self._fault("gradient norm", norm, self.norms)
        if reason is None:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row > self.settings.allowed:
            raise UserError(f"{reason}, as in {self.settings.allowed} updates before it, which were left out; {CURE}")
        LOG.warning("%s: update left out, number %d of the run", reason, self.skipped)
        return True

    def judge(self, step: int, loss: float, norm: float, *, skipped: bool) -> None:
        """After a step: take note of it. Raises Rewind or UserError where it was bad; one that was left out can do no harm."""
        if skipped:
            return
        reason = self._fault("loss", loss, self.losses) or self._fault("gradient norm", norm, self.norms)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if reason is None or (self.settings.bad_step == "skip" and finite):  # a spike of the loss alone comes too late to be left out
            self.losses.append(loss)
            self.norms.append(norm)
        elif self.settings.bad_step == "rewind":
            raise Rewind(step, reason)
        else:
            raise UserError(f"step {step}: {reason}; {CURE}")

    def _fault(self, what: str, value: float, before: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{what} {value}"
        limit = self.settings.spike
        if limit and len(before) == self.settings.window and value > limit * median(before):
            return f"{what} {value:.4g} is more than watch.spike = {limit:g} times the median {median(before):.4g} of {len(before)} steps"
        return None

    def go_back(self, bad: Rewind, *, to: int, rewound: int, batches: int) -> None:
        """The checkpoint of step `to` was restored, after `rewound` earlier returns: leave `batches` batches out from here on."""
        self.rewound = rewound + 1
        self.shift += batches
        if self.rewound > self.settings.allowed:
            raise UserError(f"step {bad.step}: {bad.reason}, and the run went back {rewound} times before; {CURE}")
        LOG.warning("step %d: %s; back to step %d, leaving out %d batches, time %d", bad.step, bad.reason, to, batches, self.rewound)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        numbers = {"shift": self.shift, "skipped": self.skipped, "rewound": self.rewound, "in_a_row": self.in_a_row}
        return {**numbers, "losses": [*self.losses], "norms": [*self.norms]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        for name in ("shift", "skipped", "rewound", "in_a_row"):
            setattr(self, name, state.get(name, 0))
        for kept, values in ((self.losses, state.get("losses", ())), (self.norms, state.get("norms", ()))):
            kept.clear()
            kept.extend(values)
