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
PASSED = (  # and those that are handed on as they are
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)
UNPROVED = (  # keys of zero_optimization that change what is computed or where, and that no parity test covers yet
    "offload_optimizer",
    "offload_param",
    "cpu_offload",
    "cpu_offload_param",
    "zenflow",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)


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
    for key in UNPROVED:
        value = zero.get(key)
        off = not value or (key == "zero_hpz_partition_size" and value == 1) or (isinstance(value, dict) and value.get("device") == "none")
        if not off:
            raise UserError(f"{path}: zero_optimization.{key} is not proved equal to one process under a mesh yet; take it out")
    train = config.train
    if stage < 2 and train.reduce == "microbatch":
        raise UserError(f"train.reduce = microbatch, but ZeRO-{stage} reduces once a step; leave train.reduce out or use ZeRO-2 or 3")
    if stage >= 2 and train.reduce == "step" and train.precision != "fp32":
        raise UserError(
            f"train.reduce = step would sum the microbatches' gradients in {train.precision}, where small ones are lost; "
            "use train.reduce = microbatch, which sums them in fp32"
        )
