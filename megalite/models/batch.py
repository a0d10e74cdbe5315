"""What a microbatch holds, by name, and how each entry lies where sequences are cut. b sequences of s tokens.

The data set gives ids and labels (and for BERT segments, length and next_sentence); the engine adds the rest.
"""

from __future__ import annotations

from torch import Tensor

Batch = dict[str, Tensor]

# (b, s), one of every token that is looked up or predicted: cut by context parallelism
TOKENS = ("ids", "labels", "weights")
# (b, s), what goes with a row of the hidden state, so cut as that is: BERT's segments; positions, where they are not 0 .. s - 1; places,
# the rows' numbers in their samples
HIDDEN = ("segments", "positions", "places")
# whole on every rank: documents (b, s), the number of each token's document, where a sample is packed from several; spans (4, b, s), the
# same or the padding as the fused kernels want it, where they are in use; and for each sample, (b,), length (tokens before the padding),
# next_sentence, pair_weights, samples (dropout's keys; in training alone); of a task's heads, which know no cut sequences, at (the token
# they judge by), classes or values, importance, sample_weights


def weigh(batch: Batch) -> tuple[str, Tensor]:
    """What every target counts before the mean is taken, and the name that the heads know it by: (b,) of samples, (b, s) of tokens."""
    if "importance" in batch:
        return "sample_weights", batch["importance"]
    return "weights", batch["labels"] != -100
