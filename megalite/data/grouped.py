"""Examples as samples of global batches: in an order without state, texts of like length together, each batch as long as its longest.

In: examples and the sizes of batches.  Out: sample number i of training or of an examination, as the loader asks for it, padded to the
length of its batch. Number i is a function of (seed, i): an epoch is shuffled by a Philox counter, a run of batches of it is sorted by
length and dealt in shuffled order. No row comes twice before every other came once, but for those runs' ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megalite.data.examples import IGNORE, Example

RUN = 50  # batches sorted by length at once, or a quarter of an epoch where that is less
LENGTHS = 8  # different lengths of batches: the pipeline keeps something for each


class Batches:
    """What training and examination have in common: from an example to arrays of one length."""

    def __init__(
        self, examples: Sequence[Example], *, kind: str, family: str, longest: int, pad: int, multiple: int, weights: Sequence[float] = ()
    ) -> None:
        """`longest`: of any batch; lengths are multiples of `multiple`. `weights`: of the classes."""
        self.examples, self.kind, self.family, self.pad = examples, kind, family, pad
        self.longest, self.weights = longest, weights
        self.lengths = np.array([len(example.ids) for example in examples])
        self.unit = min(longest, -(-max(8, math.ceil(longest / LENGTHS)) // multiple) * multiple)

    def length(self, members: np.ndarray) -> int:
        """Of a batch of these examples."""
        return min(self.longest, -(-int(self.lengths[members].max()) // self.unit) * self.unit)

    def arrays(self, index: int, length: int, *, counts: bool = True) -> dict[str, np.ndarray]:
        """One example, padded; `counts`: else it fills a batch and counts nothing."""
        example = self.examples[index]
        size = len(example.ids)
        found = {"ids": np.pad(example.ids, (0, length - size), constant_values=self.pad)}
        if self.family == "bert":
            segments = np.arange(length) >= (example.second or length)
            found |= {"segments": (segments & (np.arange(length) < size)).astype(np.int64), "length": np.array(size)}
        if example.labels is not None:
            labels = example.labels if counts else np.full(size, IGNORE)
            return found | {"labels": np.pad(labels, (0, length - size), constant_values=IGNORE)}
        found["at"] = np.array(0 if self.family == "bert" else size - 1)
        if self.kind == "classify":
            weight = self.weights[int(example.target)] if self.weights else 1.0
            found |= {"classes": np.array(int(example.target)), "importance": np.array(weight * counts, np.float32)}
        else:
            found |= {"values": np.array(example.target, np.float32), "importance": np.array(counts, np.float32)}
        return found


class Shuffled:
    """Samples of training, without end."""

    def __init__(self, batches: Batches, *, global_batch: int, seed: int, group: bool) -> None:
        self.batches, self.size, self.seed = batches, global_batch, seed
        self.run = max(1, min(RUN, len(batches.examples) // (4 * global_batch))) if group else 1
        self._epoch = lru_cache(3)(self._shuffle)
        self._members = lru_cache(4)(self._deal)

    def sample(self, number: int) -> dict[str, np.ndarray]:
        step, place = divmod(number, self.size)
        members = self.members(step)
        return self.batches.arrays(int(members[place]), self.batches.length(members))

    def members(self, step: int) -> np.ndarray:
        """The examples of a step's global batch."""
        run, batch = divmod(step, self.run)
        return self._members(run)[batch]

    @property
    def mean_length(self) -> float:
        """Tokens of a sample with its padding, over the first epoch."""
        steps = max(1, len(self.batches.examples) // self.size)
        return float(np.mean([self.batches.length(self.members(step)) for step in range(steps)]))

    def _deal(self, run: int) -> np.ndarray:
        """The batches of a run: (run, global batch)."""
        count = self.run * self.size
        places = np.arange(run * count, (run + 1) * count)
        epochs, within = np.divmod(places, len(self.batches.examples))
        members = np.array([self._epoch(int(epoch))[at] for epoch, at in zip(epochs, within, strict=True)])
        if self.run == 1:
            return members[None]
        members = members[np.argsort(self.batches.lengths[members], kind="stable")].reshape(self.run, self.size)
        return members[self._random(1, run).permutation(self.run)]

    def _shuffle(self, epoch: int) -> np.ndarray:
        return self._random(0, epoch).permutation(len(self.batches.examples))

    def _random(self, what: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, what, number]))


class Once:
    """Samples of an examination: every example once, the longest last, then fillers that count nothing."""

    def __init__(self, batches: Batches, *, global_batch: int) -> None:
        self.batches, self.size = batches, global_batch
        self.order = np.argsort(batches.lengths, kind="stable")

    @property
    def num_steps(self) -> int:
        return -(-len(self.order) // self.size)

    def sample(self, number: int) -> dict[str, np.ndarray]:
        first = number // self.size * self.size % (self.num_steps * self.size)  # the loader reads ahead, beyond the end too
        members = self.order[first : first + self.size]
        place = number % self.size
        real = place < len(members)
        return self.batches.arrays(int(members[place if real else 0]), self.batches.length(members), counts=real)


def balance(examples: Sequence[Example], num_classes: int) -> list[float]:
    """A class counts rows / (classes x its rows), as scikit-learn's `balanced`; one without rows 0."""
    counts = np.bincount([int(example.target) for example in examples], minlength=num_classes)
    return [len(examples) / (num_classes * int(count)) if count else 0.0 for count in counts]
