"""Heads for fine-tuning on a trunk of either family: a class or a number for a sample, a class for every token.

In: a hidden state and the microbatch.  Out: the weighted loss, shape (1,). In `Engine.predict` a head also keeps what it put out. They are
those of transformers, so that a fine-tuned model is exported as one of its own: BERT pools its first token through a tanh layer (Devlin et
al. 2018, arXiv:1810.04805, section 3.2); a GPT judges by its last token, after its final norm, without a bias. Every rank of a stage
holds a head whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import Model
from megalite.models.batch import Batch
from megalite.models.dropout import Dropout
from megalite.models.layers import norm

PARTS = ("loss",)


class Head(nn.Module):
    """What heads have in common: `answers`, where it is a list, gets what the head puts out, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Tensor] | None = None

    def keep(self, answer: Tensor) -> Tensor:
        if self.answers is not None:
            self.answers.append(answer.detach())
        return answer


class Sample(Head):
    """One token's hidden state -> `labels` numbers: (b, s, d), batch["at"] (b,) -> (b, n)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        bert = model.family == "bert"
        self.pool = nn.Linear(model.width, model.width) if bert else None
        self.norm = None if bert else norm(model)
        self.dropout = Dropout(model.dropout if bert else 0.0)
        self.classify = nn.Linear(model.width, model.labels, bias=bert)

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        at = batch["at"][:, None]  # (b, 1)
        picked = x.take_along_dim(at[..., None], dim=1)  # (b, 1, d)
        if self.pool is not None:
            picked = torch.tanh(self.pool(picked))
        elif self.norm is not None:
            picked = self.norm(picked)
        picked = self.dropout(picked, {**batch, "places": at})
        return self.keep(self.classify(picked[:, 0]))


class Classify(Sample):
    """batch["classes"] (b,), batch["sample_weights"] (b,)."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.logits(x, batch).float(), batch["classes"], reduction="none")
        return torch.dot(losses, batch["sample_weights"].float()).reshape(1)


class Regress(Sample):
    """Squared error of one number: batch["values"] (b,), batch["sample_weights"] (b,)."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        losses = (self.logits(x, batch)[:, 0].float() - batch["values"].float()) ** 2
        return torch.dot(losses, batch["sample_weights"].float()).reshape(1)


class Tag(Head):
    """Every token's hidden state -> n numbers; batch["labels"] (b, s), -100 where there is nothing to say, batch["weights"] (b, s)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.norm = None if model.family == "bert" else norm(model)
        self.dropout = Dropout(model.dropout)
        self.classify = nn.Linear(model.width, model.labels)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        logits = self.keep(self.classify(self.dropout(x if self.norm is None else self.norm(x), batch)))  # (b, s, n)
        losses = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].clamp(min=0).flatten(), reduction="none")
        return torch.dot(losses, batch["weights"].flatten().float()).reshape(1)


HEADS = {"classify": Classify, "regress": Regress, "tag": Tag}
