"""Plain PyTorch models as ordered lists of layers; nothing here knows a rank.

`layers` lists (name, builder), `plan` how tensor parallelism may cut it, `tied` which names share a weight, `draw` the initial
value of a weight by its name, `build` the whole model on one device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megalite.config import Model
from megalite.models import bert, gpt, heads
from megalite.models.batch import Batch, weigh
from megalite.models.dropout import name_sites, sample_keys

__all__ = ["Batch", "Whole", "attach", "build", "draw", "layers", "name_sites", "parts", "plan", "sample_keys", "tied", "weigh"]


def layers(model: Model) -> list[tuple[str, Callable[[], nn.Module]]]:
    """The model in order: embed, layers.0 ..., head."""
    found = (gpt if model.family == "gpt" else bert).layers(model)
    return found if model.head == "pretrain" else [*found[:-1], ("head", partial(heads.HEADS[model.head], model))]


def plan(model: Model) -> dict[str, str]:
    """Module name (with * for a block's number) -> how tensor parallelism cuts it."""
    return (gpt if model.family == "gpt" else bert).PLAN


def tied(model: Model) -> dict[str, str]:
    """Parameter name -> name of the parameter it is the same as."""
    return (gpt if model.family == "gpt" else bert).TIED if model.tied and model.head == "pretrain" else {}


def parts(model: Model) -> tuple[str, ...]:
    """Names of the terms whose sum is the loss; the head puts out one number for each."""
    return heads.PARTS if model.head != "pretrain" else (gpt if model.family == "gpt" else bert).PARTS


def draw(name: str, shape: tuple[int, ...], *, model: Model, seed: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU: a function of (seed, name) alone, so it is the same on every mesh.

    Norms start at 1, biases at 0, matrices at N(0, init_std); in a GPT the two matrices that write into the residual stream are
    scaled by 1/sqrt(2 layers) (Radford et al. 2019).
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = model.init_std
    if model.family == "gpt" and name.endswith(("attention.out.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * model.layers)
    source = tied(model).get(name, name)
    digest = hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


class Whole(nn.Module):
    """All layers on one device: forward(batch) -> the loss's parts (see `parts`). The reference every mesh is compared with."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            attach(self, name, part)
        self.order = list(parts)
        name_sites(self)

    def hidden(self, batch: Batch) -> Tensor:
        """What the last block puts out: (b, s, d)."""
        x = batch["ids"]
        for name in self.order[:-1]:
            x = self.get_submodule(name)(x, batch)
        return x

    def forward(self, batch: Batch) -> Tensor:
        return self.get_submodule(self.order[-1])(self.hidden(batch), batch)


def attach(root: nn.Module, name: str, part: nn.Module) -> None:
    """Put a layer under its dotted name, so that `layers.17` is `layers.17` also where a stage holds it alone."""
    *path, leaf = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.add_module(leaf, part)


def build(model: Model, *, seed: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Whole:
    """The whole model on one device with its initial weights; on device meta, shapes alone."""
    with torch.device("meta"):
        whole = Whole({name: make() for name, make in layers(model)})
    if torch.device(device).type != "meta":
        whole.to_empty(device=device)
    for copy, source in tied(model).items():
        module, leaf = copy.rsplit(".", 1)
        setattr(whole.get_submodule(module), leaf, whole.get_parameter(source))
    if torch.device(device).type == "meta":
        return whole
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(draw(name, tuple(parameter.shape), model=model, seed=seed))
    return whole.to(dtype)
