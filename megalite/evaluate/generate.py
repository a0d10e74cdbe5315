"""A checkpoint at work, on one device and without ranks: GPT goes on with a text, BERT fills its masks in.

In: a checkpoint folder, token ids.  Out: token ids. The plain model reads whole logical weights, whatever mesh wrote them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalite import models
from megalite.checkpoint import store
from megalite.config import Model, parse


def load_model(checkpoint: Path) -> tuple[models.Whole, Model]:
    """The plain model of a checkpoint, fp32, in evaluation mode."""
    model = parse(store.read_facts(checkpoint)["config"], source=str(checkpoint)).model
    whole = models.build(model, seed=0, device="meta").to_empty(device="cpu")
    weights = {name: parameter.data for name, parameter in whole.named_parameters() if name not in models.tied(model)}
    store.load_weights(checkpoint, weights)
    for copy, source in models.tied(model).items():  # to_empty makes one tensor of each name
        module, leaf = copy.rsplit(".", 1)
        setattr(whole.get_submodule(module), leaf, whole.get_parameter(source))
    return whole.eval(), model


@torch.no_grad()
def continue_text(whole: models.Whole, ids: Tensor, *, model: Model, tokens: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
    """Sample `tokens` more ids after ids (n,): softmax(logits / temperature), the context cut to the model's sequence; (n + tokens,)."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        context = ids[-model.sequence :][None]
        logits = whole.get_submodule("head").logits(whole.hidden({"ids": context}))[0, -1]  # type: ignore[operator]
        ids = torch.cat([ids, torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draw)])
    return ids


@torch.no_grad()
def fill_masks(whole: models.Whole, batch: models.Batch) -> Tensor:
    """The likeliest token at every position of a BERT batch: (b, s)."""
    return whole.get_submodule("head").logits(whole.hidden(batch)).argmax(-1)  # type: ignore[operator]
