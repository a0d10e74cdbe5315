"""What DeepSpeed runs with, and what of the user's JSON is ours to follow.

In: the DeepSpeed JSON, and what the run config owns.  Out: `Settings`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.ds_config import REDUCTION


@dataclass(frozen=True)
class Settings:
    """configuration: DeepSpeed's. stage: of ZeRO, as the user counts. reduce: "step" or "microbatch"; under the latter gradients travel in
    `dtype`, and are divided by `divide` before they are summed (None: by the number of ranks).
    """

    configuration: dict[str, Any]
    stage: int
    reduce: str
    dtype: torch.dtype
    divide: float | None
    folder: Path | None  # on a local disk, for what the optimizer keeps; None leaves it in memory

    @property
    def bucket(self) -> int:
        """How many elements may travel at once."""
        return int(self.configuration["zero_optimization"].get("reduce_bucket_size", 5e8))

    @property
    def group(self) -> int:
        """How many elements a parameter group may have: stages below 3 reduce one at once (buckets.py)."""
        return self.bucket if self.stage < 3 else sys.maxsize


def choose(document: dict[str, Any], *, precision: str, micro_batch: int, reduce: str | None) -> Settings:
    """Of a JSON that was checked (zero.py), and of what the run config owns.

    Our own 1/microbatches is in the loss, so DeepSpeed's accumulation is 1. Clipping is ours too: the norm is one of the whole mesh.
    """
    zero = dict(document.get("zero_optimization", {}))
    stage, folder = zero.get("stage", 0), offload_folder(document)
    if folder:
        zero["offload_optimizer"] = {"device": "cpu"}  # to DeepSpeed host memory, whose pages lie in files, see disk.py
    owned = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 1.0},  # the scale is ours: DeepSpeed's would multiply once a stage
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host too, and needs no compiler there
        # ZeRO 0 and 1 use the buffers of DeepSpeed's stage 2, over a group of one and over all. Stage 0 of DeepSpeed 0.19.8 reports a norm
        # of 0; its stage 1 routes bf16 to another optimizer, which accumulates and clips by itself.
        # Gradients are ours to put together (sums.py): with contiguous ones DeepSpeed's stage 3 makes a bucket at the start that none fill.
        "zero_optimization": {**zero, "stage": max(stage, 2), **({"contiguous_gradients": False} if stage == 3 else {})},
    }
    travel = document.get("communication_data_type") or precision
    return Settings(
        configuration={**{key: value for key, value in document.items() if key not in REDUCTION}, **owned},
        stage=stage,
        reduce="step" if stage < 2 else reduce or "microbatch",
        dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[travel],
        divide=None if document.get("prescale_gradients") else document.get("gradient_predivide_factor", 1.0),
        folder=folder,
    )


def offload_folder(document: dict[str, Any]) -> Path | None:
    """Where on a local disk the optimizer's state goes, if the JSON says so."""
    offload = document.get("zero_optimization", {}).get("offload_optimizer") or {}
    return Path(offload["nvme_path"]) if offload.get("device") == "nvme" else None
