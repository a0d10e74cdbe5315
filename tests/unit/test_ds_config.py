"""The DeepSpeed JSON and the run config never both decide a thing; what is not proved under a mesh is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite import ds_config
from megalite.config import Config
from megalite.ds_config import ALWAYS, OWNED, PASSED, read_document
from megalite.errors import UserError

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def _read(path: Path | str, **train: str) -> dict[str, Any]:
    return read_document(Config.model_validate({"deepspeed": str(path), "train": {"precision": "fp32", **train}}))


def _refusal(folder: Path, document: Any, **train: str) -> str:
    path = folder / "ds.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(UserError) as caught:
        _read(path, **train)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- who owns what ---------------------------------------------------------------------------------------------------------------------

BOTH = {  # key -> a value in the JSON, and what the run config has
    "train_batch_size": (64, "train.global_batch = 256"),
    "train_micro_batch_size_per_gpu": (4, "train.micro_batch = 1"),
    "gradient_accumulation_steps": (8, "train.global_batch = 256"),
    "gradient_clipping": (0.5, "train.clip = 1.0"),
    "bf16": ({"enabled": True}, "train.precision = fp32"),
    "fp16": ({"enabled": True}, "train.precision = fp32"),
    "amp": ({"enabled": True}, "train.precision = fp32"),
    "data_types": ({"grad_accum_dtype": "bf16"}, "train.precision = fp32"),
    "optimizer": ({"type": "Adam"}, "optimizer = {'lr': 0.0003"),
    "scheduler": ({"type": "WarmupLR"}, "optimizer.schedule = cosine"),
    "managed_gradient_accumulation": (True, "train.reduce = None"),
}


def test_every_owned_key_is_tried_below() -> None:
    assert BOTH.keys() == OWNED.keys()


@pytest.mark.parametrize("key", BOTH)
def test_a_key_set_in_both_is_refused_with_both_values(key: str, tmp_path: Path) -> None:
    theirs, ours = BOTH[key]
    said = _refusal(tmp_path, {"zero_optimization": {"stage": 3}, key: theirs})
    assert f"ds.json sets {key} = {json.dumps(theirs)}, but the run config decides that: {ours}" in said
    assert said.endswith("take it out of the JSON")


def test_equal_values_in_both_are_refused_too(tmp_path: Path) -> None:
    """Two places for one number drift apart."""
    assert "train.clip = 1.0" in _refusal(tmp_path, {"gradient_clipping": 1.0})


@pytest.mark.parametrize("key", PASSED)
def test_a_key_of_deepspeeds_own_is_handed_on_as_it_is(key: str, tmp_path: Path) -> None:
    value = {
        "zero_optimization": {"stage": 2},
        "communication_data_type": "fp32",
        "prescale_gradients": True,
        "gradient_predivide_factor": 2,
    }
    document = {"zero_optimization": {"stage": 2}, key: value.get(key, {"enabled": False})}
    (tmp_path / "ds.json").write_text(json.dumps(document))
    assert _read(tmp_path / "ds.json") == document


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    said = _refusal(tmp_path, {"zero_optimisation": {"stage": 3}})
    assert "sets zero_optimisation, which megalite does not hand to DeepSpeed; did you mean zero_optimization?" in said
    assert "it hands on zero_optimization, communication_data_type" in said


# ---- files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_found_by_name_and_by_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(ds_config.__file__).parents[1] / "ds_configs" / f"{name}.json"
    monkeypatch.chdir(tmp_path)
    expected = json.loads(path.read_text())
    assert expected["zero_optimization"]["stage"] == (int(name[4]) if name[4].isdigit() else 3)
    for way in (name, f"{name}.json", f"ds_configs/{name}.json", path):
        assert _read(way) == expected, way


def test_a_file_in_the_working_directory_goes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero3.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert _read("zero3.json")["zero_optimization"]["stage"] == 1


def test_no_file_means_no_zero() -> None:
    assert read_document(Config()) == {}


@pytest.mark.parametrize("name", ["zero4", "nowhere/zero3.json", "", "."])
def test_a_file_that_does_not_exist_is_refused_and_no_other_one_taken_for_it(name: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(name)
    known = ", ".join(sorted(f"{shipped}.json" for shipped in SHIPPED))
    said = f"deepspeed = {name} does not exist; give the path of a DeepSpeed JSON or one of ds_configs/: {known}"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {', "ds.json is no JSON: Expecting property name"),
        ("[1]", "ds.json holds a list, but a DeepSpeed configuration is an object"),
        ("", "ds.json is no JSON"),
        ('{"zero_optimization": 3}', "zero_optimization = 3, but it is an object"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    assert words in _refusal(tmp_path, text)


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is no JSON"):
        _read(tmp_path / "ds.json")


# ---- offload and ZeRO++ ----------------------------------------------------------------------------------------------------------------


def test_quantized_gradients_are_not_sent_once_a_step(tmp_path: Path) -> None:
    said = _refusal(tmp_path, {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, reduce="step")
    assert "zero_quantized_gradients with train.reduce = step, which sends gradients in fp32" in said


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 3, "cpu_offload": True}, "zero_optimization.cpu_offload is DeepSpeed's old name; write offload_optimizer"),
        ({"stage": 3, "zenflow": {"topk_ratio": 0.1}}, "zero_optimization.zenflow updates weights with gradients of earlier steps"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "is for weights that are not trained"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs ZeRO-1 or more, but zero_optimization.stage = 0"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs ZeRO-3 or more, but zero_optimization.stage = 2"),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}},
            'offload_param.device = "nvme", but it is one of none, cpu, since weights on a',
        ),
        ({"stage": 3, "offload_optimizer": {"device": "tape"}}, 'offload_optimizer.device = "tape", but it is one of none, cpu, nvme'),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device = nvme needs offload_optimizer.nvme_path"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio = 0.5, but a part of an optimizer"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size is part of ZeRO++, which needs ZeRO-3"),
        ({"stage": 2, "zero_quantized_weights": True}, "zero_quantized_weights is part of ZeRO++, which needs ZeRO-3"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, "zero_hpz_partition_size = 3 does not divide mesh.dp x mesh.cp = 4 x 1"),
        ({"stage": 3, "zero_hpz_partition_size": "2"}, 'zero_hpz_partition_size = "2", but it is a number of ranks'),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_quantized_gradients with mesh.pp x mesh.tp = 2 x 1"),
    ],
)
def test_offload_and_zero_plus_plus_that_cannot_be_right_are_refused(zero: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run = Config.model_validate({"mesh": {"dp": 4, "pp": 2}, "deepspeed": str(tmp_path / "ds.json")})
    with pytest.raises(UserError) as caught:
        ds_config.read_document(run)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("offload_optimizer", {"device": "none"}), ("zero_hpz_partition_size", 1), ("zero_quantized_weights", False)]
)
def test_the_same_keys_switched_off_are_let_through(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, key: value}}))
    assert _read(tmp_path / "ds.json")["zero_optimization"][key] == value


@pytest.mark.parametrize("stage", [4, -1, "3", True, 2.5, None])
def test_a_stage_that_zero_does_not_have_is_refused(stage: Any, tmp_path: Path) -> None:
    said = _refusal(tmp_path, {"zero_optimization": {"stage": stage}})
    assert f"zero_optimization.stage = {json.dumps(stage)}, but ZeRO has stages 0 to 3" in said


@pytest.mark.parametrize("stage", [0, 1])
def test_zero_0_and_1_cannot_reduce_every_microbatch(stage: int, tmp_path: Path) -> None:
    said = _refusal(tmp_path, {"zero_optimization": {"stage": stage}}, reduce="microbatch")
    assert f"train.reduce = microbatch, but ZeRO-{stage} reduces once a step; leave train.reduce out or use ZeRO-2 or 3" in said


@pytest.mark.parametrize(("key", "value"), [("communication_data_type", "bf16"), ("prescale_gradients", True)])
def test_how_gradients_travel_is_settled_where_they_do_so_once_a_step(key: str, value: Any, tmp_path: Path) -> None:
    document = {"zero_optimization": {"stage": 1}, key: value}
    words = f"{key} = {json.dumps(value)}, but gradients that are reduced once a step are sent in fp32; take it out"
    assert words in _refusal(tmp_path, document)
    document["zero_optimization"]["stage"] = 2
    assert words in _refusal(tmp_path, document, reduce="step")
    (tmp_path / "ds.json").write_text(json.dumps(document))
    assert _read(tmp_path / "ds.json") == document


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("communication_data_type", "fp8", 'communication_data_type = "fp8", but it is one of fp32, fp16, bf16; choose one of them'),
        ("prescale_gradients", "yes", 'prescale_gradients = "yes", but it is true or false'),
        ("gradient_predivide_factor", 0, "gradient_predivide_factor = 0, but gradients are divided by a number above 0"),
    ],
)
def test_a_way_to_travel_that_there_is_not_is_refused(key: str, value: Any, words: str, tmp_path: Path) -> None:
    assert words in _refusal(tmp_path, {"zero_optimization": {"stage": 3}, key: value})


@pytest.mark.parametrize("key", ALWAYS)
def test_gradients_are_always_scattered(key: str, tmp_path: Path) -> None:
    words = f"zero_optimization.{key} = false, but gradients of ZeRO-1 to 3 are always scattered; take it out"
    assert words in _refusal(tmp_path, {"zero_optimization": {"stage": 3, key: False}})
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, key: True}}))
    assert _read(tmp_path / "ds.json")["zero_optimization"][key]


@pytest.mark.parametrize(
    ("stage", "reduce", "precision"),
    [(2, "microbatch", "bf16"), (3, "step", "fp32"), (3, "microbatch", "fp32"), (1, "step", "bf16"), (3, "step", "bf16")],
)
def test_what_fits_together_is_read(stage: int, reduce: str, precision: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    assert _read(tmp_path / "ds.json", reduce=reduce, precision=precision) == {"zero_optimization": {"stage": stage}}
