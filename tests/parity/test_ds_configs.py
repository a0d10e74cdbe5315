"""Every file of ds_configs/ computes what one process computes, on a mesh of all axes. What needs a GPU is in tests/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare import assert_same, config_of, on_mesh, reference

from megalite import ds_config, models
from megalite.config import Config
from megalite.errors import UserError
from megalite.parallel import zero
from megalite.tune.verify import compare_rounded

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
QUANTIZED = {"zeropp-quantized"}
SLOW = pytest.mark.slow
# stages tried by test_layouts.py on every mesh, and what is offloaded with the parameters too
OFTEN = {"zero0", "zero1", "zero2", "zero3", "zero3-cpu-offload"}


def _document(name: str, tmp_path: Path) -> dict[str, Any]:
    """The file, made to fit a small machine: a folder that is there, a node of two ranks, weights small enough to be sharded."""
    document = ds_config.read_document(Config.model_validate({"deepspeed": name, "train": {"precision": "fp32"}}))
    found = document["zero_optimization"]
    if found.get("offload_optimizer", {}).get("device") == "nvme":
        found["offload_optimizer"]["nvme_path"] = str(tmp_path / "disk")
    if "zero_hpz_partition_size" in found:
        found["zero_hpz_partition_size"] = 2
    if found["stage"] == 3:
        found |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 3000, "stage3_max_reuse_distance": 3000}
    return document


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=(SLOW,) if schedule == "gpipe" or name in OFTEN else ())
        for name in sorted(set(NAMES) - QUANTIZED)
        for schedule in ("1f1b", "gpipe")
    ],
)
def test_a_shipped_configuration_computes_what_one_process_computes(name: str, schedule: str, tmp_path: Path) -> None:
    config = config_of(dp=2, pp=2, tp=2, schedule=schedule)
    if name == "zeropp":
        config = config_of(dp=4, pp=2, schedule=schedule)
    ours = on_mesh(config, zero=_document(name, tmp_path))
    assert_same(ours, reference(config), tied=models.tied(config.model))
    assert not list((tmp_path / "disk").glob("*")), "a file was left on the disk"


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("zero2-cpu-offload", "bf16"),
        ("zero3-nvme", "fp16"),
        *(pytest.param(*case, marks=SLOW) for case in (("zero2-cpu-offload", "fp16"), ("zero3-nvme", "bf16"))),
        *(pytest.param("zero3-cpu-offload", precision, marks=SLOW) for precision in ("bf16", "fp16")),
    ],
)
def test_offloaded_gradients_are_summed_in_fp32(name: str, precision: str, tmp_path: Path) -> None:
    config = config_of(dp=2, pp=2, precision=precision)
    found = compare_rounded(config, on_mesh(config, zero=_document(name, tmp_path)))
    assert not [finding for finding in found if not finding.good]


@pytest.mark.parametrize(
    ("name", "schedule", "precision"),
    [
        ("zero2-cpu-offload", "interleaved", "fp32"),
        *(pytest.param("zero2-cpu-offload", "looped", precision, marks=SLOW) for precision in ("fp32", "bf16", "fp16")),
        *(pytest.param("zero3-cpu-offload", "looped", precision, marks=SLOW) for precision in ("fp32", "bf16")),
    ],
)
def test_offloaded_gradients_of_several_chunks_begin_anew_in_every_step(name: str, schedule: str, precision: str, tmp_path: Path) -> None:
    """In fp32, DeepSpeed's stage 2 counts backward passes, and added to the gradients of the step before (draw 15 of `make fuzz`)."""
    config = config_of(dp=2, pp=2, layers=4, schedule=schedule, precision=precision)
    ours = on_mesh(config, zero=_document(name, tmp_path))
    if precision == "fp32":
        assert_same(ours, reference(config), tied=models.tied(config.model))
    else:
        assert not [finding for finding in compare_rounded(config, ours) if not finding.good]


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_what_needs_a_gpu_is_valid_and_says_so_on_a_cpu(name: str) -> None:
    document = json.loads((FOLDER / f"{name}.json").read_text())
    with pytest.raises(UserError, match="needs a GPU, for which DeepSpeed compiles its quantizer; take it out"):
        zero.check(document)
    named = (FOLDER.parent / "tests/gpu/test_train.py").read_text()
    assert name in named, f"no test of tests/gpu runs {name}"


def test_a_disk_without_room_is_one_clear_line(tmp_path: Path) -> None:
    document = _document("zero3-nvme", tmp_path)
    (tmp_path / "disk").write_text("a file, and no folder")
    with pytest.raises(UserError, match=r"nvme_path = .* cannot be written"):
        on_mesh(config_of(dp=2), zero=document)
