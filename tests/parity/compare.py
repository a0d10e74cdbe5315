"""The question all parity tests ask: does this mesh compute what one process of plain PyTorch computes?

`reference` trains the plain model with plain AdamW; `on_mesh` trains it on forked ranks and puts every gradient and weight together
again from the pieces the ranks own. `assert_same` compares loss, gradient norm, every gradient and every updated weight, step by step.

The measure is max |a - b| / max |b| of a tensor: relative to the largest element, because a gradient holds many numbers that cancel to
nearly nothing, whose own relative error says only how they cancelled. Adam's eps is 1e-2, not 1e-8: the gradient of a key's bias is 0 by
construction (softmax does not see a shift), and with a tiny eps Adam would turn the noise around that 0 into a full step either way.
It also lets a wrongly scaled gradient show in the weights, which a tiny eps would hide. A bias starts at 0 and moves by up to lr a
step; where two steps cancel, what is left says nothing of the steps, so weights all smaller than lr are measured against lr.
"""

from __future__ import annotations

from megalite.config import Config
from megalite.models import counts
from megalite.tune import parity
from megalite.tune.parity import Step, difference

TOLERANCE = 1e-5
STEPS = 3
RATE = 1e-2  # the learning rate


def config_of(
    *,
    family: str = "gpt",
    style: str = "gpt2",
    tied: bool = True,
    layers: int = 3,
    dp: int = 1,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    **train: object,
) -> Config:
    """A model small enough for a second, odd enough to find mistakes: widths and vocabulary that no degree divides well."""
    llama = {"positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 4, "mlp": 50}
    return Config.model_validate(
        {
            "model": {
                "family": family, "layers": layers, "width": 48, "heads": 8 if style == "llama" else 4, "vocab": 67, "sequence": 16,
                "tied": tied, "init_std": 0.1, **(llama if style == "llama" else {"activation": "gelu"} if family == "bert" else {}),
            },
            "mesh": {"dp": dp, "pp": pp, "cp": cp, "tp": tp},
            "train": {"steps": 100, "global_batch": 16, "micro_batch": 2, "precision": "fp32", "clip": 0.5, **train},
            "optimizer": {"lr": RATE, "warmup": 2, "weight_decay": 0.1, "eps": 1e-2},
        }
    )  # fmt: skip


def reference(config: Config, *, steps: int = STEPS) -> list[Step]:
    return parity.reference(config, steps=steps)


def on_mesh(config: Config, *, zero: dict | int = 0, steps: int = STEPS) -> list[Step]:
    """`zero` is a stage, or a whole DeepSpeed document. Of a stage's weights under ZeRO-3 some stay, and the others come and go."""
    share = counts.num_parameters(config.model) // (config.mesh.pp * config.mesh.tp)
    limits = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": share * 6 // 10,
        "stage3_prefetch_bucket_size": share // 6,
        "reduce_bucket_size": share // 4,  # several travel, some before the last backward pass is over
    }
    document = {"zero_optimization": {"stage": zero, **limits}} if isinstance(zero, int) else zero
    return parity.assemble(parity.on_mesh(config, document, steps=steps, counted=False), steps=steps)


def assert_same(ours: list[Step], theirs: list[Step], *, tied: dict[str, str], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs) >= 3
    for number, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(mine.loss - plain.loss) <= tolerance * abs(plain.loss), f"step {number}: loss {mine.loss} is not {plain.loss}"
        assert abs(mine.grad_norm - plain.grad_norm) <= tolerance * plain.grad_norm, (
            f"step {number}: norm {mine.grad_norm} is not {plain.grad_norm}"
        )
        for what in ("gradients", "weights"):
            a, b = getattr(mine, what), getattr(plain, what)
            assert a.keys() - tied.keys() == b.keys() - tied.keys(), f"step {number}: {what} of other parameters"
            least = RATE if what == "weights" else 1e-30
            worst = max((difference(a[name], b[tied.get(name, name)], least=least), name) for name in a)
            assert worst[0] <= tolerance, f"step {number}: {what} of {worst[1]} differ by {worst[0]:.2e}"
