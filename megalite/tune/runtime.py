"""How a training stack differs from another where memory and time are concerned, and the constants that were fitted to its measured runs.

In: a runtime's name, and the cluster if it was calibrated.  Out: a `Runtime`. What a stack does by design stands here; what had to be
fitted is in constants.yaml, with the table it was fitted on and the error that was left (see fitting.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from megalite.config import suggest
from megalite.errors import UserError


@dataclass(frozen=True)
class Constants:
    """Of the time model (see speed.py). Shares and factors are pure numbers, the rest is seconds; the defaults are physics and
    judgement."""

    matmul: float = 0.95  # of the reachable peak, for large products
    operands: float = 1.0  # how often a product's operands and result pass through memory
    attention: float = 0.55  # of the reachable peak
    scores: float = 1.0  # for attention without FlashAttention
    elementwise: float = 1.0
    logits: float = 1.0
    launch: float = 1.2e-3  # a block's kernels, forward and backward
    launch_tp: float = 0.3e-3  # what the collectives of tensor parallelism over 8 ranks add
    launch_far: float = 1e-5  # what a tensor-parallel rank adds in a pipeline that leaves the node
    embed: float = 0.2  # an embedding, in blocks
    tp_inside: float = 0.8
    tp_between: float = 0.6
    tp_hidden: float = 0.0
    alpha_inside: float = 3e-5
    alpha_between: float = 1e-4
    alpha_hop: float = 5e-5
    hop_shown: float = 0.5  # of the sends in a full pipeline, those that somebody waits for
    zero_inside: float = 0.8
    zero_between: float = 0.8
    zero_hidden: float = 0.5  # of gradients' traffic, what hides behind the backward pass
    optimizer: float = 1.5
    host: float = 2.0
    step: float = 0.02
    microbatch: float = 0.0
    straggle: float = 0.01


@dataclass(frozen=True)
class MemoryConstants:
    """Of the memory model (see memory.py): bytes, or pure numbers."""

    context: float = 1.0e9  # what a process holds on the GPU beside its tensors: CUDA's context, libraries' workspaces
    alone: float = 0.0  # hidden states, whole, that a rank without a pipeline holds besides; measured, and not understood
    linear: float = 1.0  # factors on activations of a block that are proportional to s d, to s f
    widening: float = 1.0
    logits: float = 1.0  # on the vocabulary's activations
    gradient: float = 1.0  # on gradients
    uncut: float = 0.0  # hidden states a block keeps whole on every tensor-parallel rank, though its own are cut along the sequence
    passing: float = 0.0  # hidden states, whole, that live at the fullest moment only
    fresh: float = 0.0  # bytes a parameter of gradients while the backward pass makes them
    update: float = 0.0  # bytes a parameter that the optimizer needs for its own arithmetic
    exchange: float = 0.0  # bytes a parameter of the rank's while gradients or new weights are exchanged


@dataclass(frozen=True)
class Runtime:
    """One training stack."""

    name: str
    rule: str  # how layers become stages, see splits.py
    outer: str  # the axis along which ranks lie farthest apart
    precision: str = "bf16"
    width: int = 2  # bytes of a weight and of an activation
    gradient_width: int = 2  # bytes of a gradient on a link
    summed_width: int = 2  # and of one that travels once a step
    scatters: tuple[int, ...] = (2, 3)  # the ZeRO stages whose gradients are scattered, not all-reduced
    flash: bool = True
    state_bytes: float = 12.0  # a parameter: fp32 master weight and two moments
    constants: Constants = Constants()
    memory: MemoryConstants = MemoryConstants()
    spread: float = 0.15  # standard deviation of log(measured / predicted) of step times
    memory_spread: float = 0.05
    fitted: str = ""  # on what


# fmt: off
DESIGN = {
    # ours: gradients travel in the weights' type, and once a step in fp32: parallel/sums.py
    "megalite": Runtime("megalite", rule="cost", outer="dp", summed_width=4, scatters=(1, 2, 3)),
    # nanotron: pipeline stages by a threshold on cost, ranks as (pp, dp, tp), fp32 gradients, ZeRO-1 scatters them
    "nanotron": Runtime(
        "nanotron", rule="threshold", outer="pp", gradient_width=4, summed_width=4, scatters=(1, 2, 3),
        constants=Constants(launch=4e-3, launch_far=3e-3, alpha_between=1e-3),
        memory=MemoryConstants(alone=30.0, uncut=1.0, passing=2.0, fresh=0.5, update=6.0, exchange=2.0),
    ),
    # Megatron-LM under DeepSpeed, as BLOOM and vTrain ran it: layers evenly, ranks as (pp, dp, tp), fp16 gradients, fused softmax
    "megatron-deepspeed": Runtime("megatron-deepspeed", rule="even", outer="pp", precision="fp16", flash=False),
    # PyTorch FSDP as llm-foundry runs it: ZeRO-3 or ZeRO-2 all of it, and a fused loss, whose logits are there once, in bf16, and become
    # their gradient
    "fsdp": Runtime("fsdp", rule="even", outer="pp", memory=MemoryConstants(logits=1 / 3)),
}
# fmt: on


def find(name: str, *, kind: str = "") -> Runtime:
    """A runtime with the constants for that kind of GPU where they were fitted. Raises UserError for an unknown name."""
    if name not in DESIGN:
        raise UserError(f"--runtime {name} is not known{suggest(name, [*DESIGN])}; there are {', '.join(DESIGN)}")
    document = yaml.safe_load((resources.files("megalite.tune") / "constants.yaml").read_text(encoding="utf-8"))
    return with_constants(DESIGN[name], [entry for entry in document if _fits(entry, name, kind)])


def _fits(entry: dict[str, Any], name: str, kind: str) -> bool:
    return name in entry["runtimes"] and ("kinds" not in entry or kind in entry["kinds"])


def with_constants(runtime: Runtime, entries: list[dict[str, Any]]) -> Runtime:
    """Later entries win."""
    for entry in entries:
        runtime = replace(
            runtime,
            constants=replace(runtime.constants, **entry.get("time", {})),
            memory=replace(runtime.memory, **entry.get("memory", {})),
            **{key: entry[key] for key in ("spread", "memory_spread") if key in entry},
            fitted=entry["fitted"],
        )
    return runtime


def names(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
