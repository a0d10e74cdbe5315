"""The DeepSpeed JSON: found, read, and checked against the run config before a rank starts.

In: the run config, whose `deepspeed` names the file.  Out: the document as `parallel/zero.py` takes it. Who owns which key stands in OWNED
and PASSED, and in ds_configs/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megalite.config import Config, suggest
from megalite.errors import UserError

OWNED = {  # DeepSpeed's keys that the run config decides
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "train.clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "managed_gradient_accumulation": "train.reduce",
}
REDUCTION: dict[str, Any] = {  # how every microbatch's gradients travel, with DeepSpeed's own values: parallel/sums.py
    "communication_data_type": None,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
}
TRAVEL_AS = ("fp32", "fp16", "bf16")
PASSED = (  # and those that are handed on as they are
    "zero_optimization",
    *REDUCTION,
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)
REFUSED = {  # keys of zero_optimization that change what is computed, or where, in a way that no parity test covers
    "cpu_offload": "is DeepSpeed's old name; write offload_optimizer: {device: cpu}",
    "cpu_offload_param": "is DeepSpeed's old name; write offload_param: {device: cpu}",
    "enable_sanity_checks": "has all ranks compare the modules they hold, and those of different stages differ; take it out",
    "zenflow": "updates weights with gradients of earlier steps, which no other layout computes; take it out",
    "zero_quantized_nontrainable_weights": "is for weights that are not trained, and here all are; take it out",
}
ALWAYS = ("contiguous_gradients", "reduce_scatter")  # what is done whatever they say: parallel/sums.py


def read_document(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that config.deepspeed names, checked against the run config; {} where it names none.

    A path, or the name of a file of ds_configs/. Raises UserError for a key that both own, for one that is not handed on, and for what
    is not proved under a mesh.
    """
    if config.deepspeed is None:
        return {}
    path = _find_document(config.deepspeed)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}, but a DeepSpeed configuration is an object with zero_optimization")
    for key, value in document.items():
        if key in OWNED:
            ours: Any = config
            for step in OWNED[key].split("."):
                ours = getattr(ours, step)
            ours = ours.model_dump() if isinstance(ours, BaseModel) else ours
            raise UserError(
                f"{path} sets {key} = {json.dumps(value)}, but the run config decides that: {OWNED[key]} = {ours}; take it out of the JSON"
            )
        if key not in PASSED:
            raise UserError(
                f"{path} sets {key}, which megalite does not hand to DeepSpeed{suggest(key, [*PASSED])}; it hands on {', '.join(PASSED)}"
            )
    _check_zero(config, document, path)
    return document


def _find_document(name: str) -> Path:
    shipped = Path(__file__).parent.parent / "ds_configs"
    if not shipped.is_dir():
        shipped = shipped.with_name("megalite_ds_configs")  # as a wheel installs it, see setup.py
    given = Path(name)
    # ds_configs/FILE.json also from another working directory; any other folder is the user's own
    beside = [shipped / given.name] if given.parent in (Path(), Path("ds_configs")) else []
    for path in (given, *beside, *(path.with_name(f"{path.name}.json") for path in beside)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in shipped.glob("*.json")))
    raise UserError(f"deepspeed = {name} does not exist; give the path of a DeepSpeed JSON or one of ds_configs/: {known}")


def _check_zero(config: Config, document: dict[str, Any], path: Path) -> None:
    zero = document.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path}: zero_optimization = {json.dumps(zero)}, but it is an object; for instance " + '{"stage": 3}')
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage = {json.dumps(stage)}, but ZeRO has stages 0 to 3; choose one of them")
    for key, reason in REFUSED.items():
        if zero.get(key):
            raise UserError(f"{path}: zero_optimization.{key} {reason}")
    for key in ALWAYS:
        if not zero.get(key, True):
            raise UserError(f"{path}: zero_optimization.{key} = false, but gradients of ZeRO-1 to 3 are always scattered; take it out")
    _check_offload(zero, stage, path)
    _check_zeropp(config, zero, stage, path)
    train = config.train
    _check_reduction(document, path, once=stage < 2 or train.reduce == "step")
    if stage < 2 and train.reduce == "microbatch":
        raise UserError(f"train.reduce = microbatch, but ZeRO-{stage} reduces once a step; leave train.reduce out or use ZeRO-2 or 3")
    if zero.get("zero_quantized_gradients") and train.reduce == "step":
        raise UserError(f"{path}: zero_quantized_gradients with train.reduce = step, which sends gradients in fp32; take one of them out")


def _check_reduction(document: dict[str, Any], path: Path, *, once: bool) -> None:
    told = {key: document.get(key, usual) for key, usual in REDUCTION.items()}
    for key, usual in REDUCTION.items():
        if once and told[key] != usual:
            raise UserError(
                f"{path} sets {key} = {json.dumps(told[key])}, but gradients that are reduced once a step are sent in fp32; take it out"
            )
    travel, prescale, divide = told.values()
    if travel not in (None, *TRAVEL_AS):
        raise UserError(
            f"{path}: communication_data_type = {json.dumps(travel)}, but it is one of {', '.join(TRAVEL_AS)}; choose one of them"
        )
    if type(prescale) is not bool:
        raise UserError(f"{path}: prescale_gradients = {json.dumps(prescale)}, but it is true or false")
    if type(divide) not in (int, float) or divide <= 0:
        raise UserError(f"{path}: gradient_predivide_factor = {json.dumps(divide)}, but gradients are divided by a number above 0")


def _check_offload(zero: dict[str, Any], stage: int, path: Path) -> None:
    for key, devices, least in (("offload_optimizer", ("none", "cpu", "nvme"), 1), ("offload_param", ("none", "cpu"), 3)):
        offload = zero.get(key) or {}
        device = offload.get("device", "none") if isinstance(offload, dict) else offload
        if device not in devices:
            hint = ", since weights on a disk would be read for every microbatch" if key == "offload_param" and device == "nvme" else ""
            raise UserError(f"{path}: {key}.device = {json.dumps(device)}, but it is one of {', '.join(devices)}{hint}; choose one of them")
        if device != "none" and stage < least:
            raise UserError(f"{path}: {key} needs ZeRO-{least} or more, but zero_optimization.stage = {stage}; raise the stage")
        if device == "nvme" and not isinstance(offload.get("nvme_path"), str):
            raise UserError(f"{path}: {key}.device = nvme needs {key}.nvme_path, a folder on a local disk of every node")
        if offload and offload.get("ratio", 1.0) != 1.0:
            raise UserError(f"{path}: {key}.ratio = {offload['ratio']}, but a part of an optimizer is not offloaded here; take ratio out")


def _check_zeropp(config: Config, zero: dict[str, Any], stage: int, path: Path) -> None:
    """ZeRO++ (Wang et al. 2023, arXiv:2306.10209): hpZ is a size, qwZ and qgZ are switches that need a GPU (see `parallel/zero.py`)."""
    mesh, size = config.mesh, zero.get("zero_hpz_partition_size", 1)
    asked = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    if (asked or size != 1) and stage != 3:
        key = asked[0] if asked else "zero_hpz_partition_size"
        raise UserError(f"{path}: {key} is part of ZeRO++, which needs ZeRO-3, but zero_optimization.stage = {stage}; raise the stage")
    if type(size) is not int or size < 1:
        raise UserError(f"{path}: zero_hpz_partition_size = {json.dumps(size)}, but it is a number of ranks, 1 or more")
    if mesh.dp and (mesh.dp * mesh.cp) % size:
        raise UserError(
            f"{path}: zero_hpz_partition_size = {size} does not divide mesh.dp x mesh.cp = {mesh.dp} x {mesh.cp}, the ranks that share "
            f"weights; choose a divisor of {mesh.dp * mesh.cp}"
        )
    if "zero_quantized_gradients" in asked and mesh.pp * mesh.tp > 1:
        raise UserError(
            f"{path}: zero_quantized_gradients with mesh.pp x mesh.tp = {mesh.pp} x {mesh.tp}, but DeepSpeed 0.19.8 exchanges quantized "
            "gradients between neighbours of the whole world, which hold other weights then; use mesh.pp 1 and mesh.tp 1 or take it out"
        )
