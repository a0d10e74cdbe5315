"""Held-out loss, on the training mesh: the same batches every time, in order, masked alike.

In: an engine and a loader over the validation source.  Out: the parts of the mean loss; its token part stands beside the unigram
entropy of the shard, the loss of a model that knows only how frequent each token is.
"""

from __future__ import annotations

from megalite.data.loader import Loader
from megalite.engine import Engine


def validate(engine: Engine, loader: Loader, *, batches: int) -> dict[str, float]:
    """Mean over `batches` global batches of each part of the loss, the same on every rank."""
    found = [engine.validate(loader.step(number)) for number in range(batches)]
    return {name: sum(parts[name] for parts in found) / batches for name in found[0]}
