"""Twenty steps of a small model on one device, with fused attention and dropout or plain PyTorch: losses and gradients of every step.

GPT trains on packed documents with their mask, BERT on padded pairs: two batches of the parity tests in turn, so that there is something
to learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalite import models
from megalite.config import Config
from megalite.models import attention, dropout
from megalite.tune.parity import batch_of

STEPS = 20
FAMILIES = ("gpt", "bert")


def config_of(family: str, *, sequence: int, width: int, heads: int, layers: int, samples: int, dropout: float = 0.0) -> Config:
    style = {"positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": heads // 2, "tied": False}
    shape = {"family": family, "layers": layers, "width": width, "heads": heads, "vocab": 61, "sequence": sequence, "init_std": 0.1}
    shape["attention_dropout"] = shape["dropout"] = dropout
    return Config.model_validate(
        {
            "model": {**shape, **(style if family == "gpt" else {"activation": "gelu"})},
            "data": {"document_mask": family == "gpt"},
            "train": {"global_batch": samples},
        }
    )


@contextmanager
def attending(fused: bool) -> Iterator[list[tuple[int, ...]]]:
    """Attention and dropout by the kernels, wherever the tensors are, or by PyTorch; the shapes of the queries that the kernels saw."""
    seen: list[tuple[int, ...]] = []
    original = attention.attention

    def run(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(q.shape))
        return original(q, *args, **kwargs, impl="triton")

    dropping = partial(dropout.dropout, impl="triton" if fused else "reference")
    with (
        mock.patch.object(attention, "is_fused", lambda q, dropout=False: fused),
        mock.patch.object(attention, "attention", run),
        mock.patch.object(dropout, "dropout", dropping),
    ):
        yield seen


def train(config: Config, *, fused: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[float], list[Tensor]]:
    """The loss of every step, and all gradients of every step end to end, fp32 on the CPU. Master weights are fp32 in any dtype."""
    masters = models.build(config.model, seed=1, device=device)
    whole = models.build(config.model, seed=1, device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-2, eps=1e-2)
    losses, gradients = [], []
    with attending(fused) as seen:
        for step in range(STEPS):
            batch = {name: value.to(device) for name, value in batch_of(config, step % 2).items()}
            targets = batch["labels"] != -100
            batch["weights"] = targets / targets.sum()
            batch["pair_weights"] = torch.full((len(targets),), 1 / len(targets), device=device)
            if config.model.attention_dropout:
                batch["samples"] = models.sample_keys(torch.arange(len(targets), device=device), seed=1, step=step)
            batch = attention.with_spans(batch, model=config.model, dtype=dtype)
            assert ("spans" in batch) == fused
            loss = whole(batch).sum()
            loss.backward()
            for copy, master in zip(whole.parameters(), masters.parameters(), strict=True):
                assert copy.grad is not None
                master.grad, copy.grad = copy.grad.float(), None
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in masters.parameters()]))  # type: ignore[union-attr]
            optimizer.step()
            with torch.no_grad():
                for copy, master in zip(whole.parameters(), masters.parameters(), strict=True):
                    copy.copy_(master)
    assert len(seen) == (STEPS * config.model.layers if fused else 0)
    return losses, gradients


def distance(ours: Any, theirs: Any) -> float:
    """Of two runs, in the 2-norm over all steps, relative."""
    a, b = (torch.stack(list(x)) if isinstance(x[0], Tensor) else torch.tensor(x) for x in (ours, theirs))
    return float((a.double() - b.double()).norm() / b.double().norm())
