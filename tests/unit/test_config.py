"""The run config: default < file < flag, every mistake in one line, and a resolved config that loads again as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megalite import config as settings
from megalite import pretrain
from megalite.config import Config, Optimizer
from megalite.errors import UserError
from megalite.fit import resolve_mesh


def _file(folder: Path, document: Any, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def _refusal(document: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        settings.parse(document, source="mine.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- default < file < flag -------------------------------------------------------------------------------------------------------------


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    name = _file(tmp_path, {"model": {"layers": 3, "width": 96}, "train": {"steps": 7}})
    run = settings.load(name, overrides={"model": {"layers": "5"}})
    assert run.model.layers == 5, "the flag"
    assert (run.model.width, run.train.steps) == (96, 7), "the file"
    assert (run.model.heads, run.train.global_batch) == (12, 256), "the default"


def test_a_flag_may_set_what_the_file_leaves_out(tmp_path: Path) -> None:
    assert settings.load(_file(tmp_path, {"model": None}), overrides={"model": {"layers": 2}}).model.layers == 2


def test_a_list_by_flag_replaces_the_list_of_the_file(tmp_path: Path) -> None:
    name = _file(tmp_path, {"data": {"train": ["a", "b"]}})
    assert settings.load(name, overrides={"data": {"train": ["c"]}}).data.train == ("c",)


def test_a_run_file_is_called_after_its_file_unless_it_says_so(tmp_path: Path) -> None:
    assert settings.load(_file(tmp_path, {"train": {"steps": 1}})).name == "mine"
    assert settings.load(_file(tmp_path, {"name": "other"})).name == "other"


def test_the_run_folder_is_the_one_asked_for_or_named_after_the_run() -> None:
    assert settings.run_folder(Config(name="first")) == Path("runs/first")
    assert settings.run_folder(Config.model_validate({"name": "first", "run": {"folder": "elsewhere"}})) == Path("elsewhere")


@pytest.mark.parametrize("name", settings.recipes())
def test_every_recipe_loads_and_takes_flags(name: str) -> None:
    run = settings.load(name, overrides={"train": {"steps": "3"}})
    assert (run.name, run.train.steps) == (name, 3)
    assert run.model == settings.load(name).model


# ---- mistakes --------------------------------------------------------------------------------------------------------------------------


def test_all_mistakes_stand_in_one_line_with_the_nearest_right_name() -> None:
    said = _refusal({"model": {"layer": 3, "heads": "many"}, "tran": {"steps": 1}, "train": {"steps": 0, "precision": "fp31"}})
    assert said.startswith("mine.yaml: ")
    for part in (
        "model.layer is no setting; did you mean layers?",
        "tran is no setting; did you mean train?",
        "model.heads = 'many': input should be a valid integer",
        "train.steps = 0: input should be greater than 0",
        "train.precision = 'fp31': input should be 'fp32', 'bf16' or 'fp16'",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"model": {"width": 100, "heads": 3}}, "model.width = 100 is not divisible by model.heads = 3; choose heads that divide it"),
        ({"model": {"heads": 12, "kv_heads": 5}}, "model.heads = 12 is not divisible by model.kv_heads = 5; choose kv_heads"),
        ({"model": {"width": 36, "heads": 12, "positions": "rope"}}, "even head width, but width / heads = 3"),
        ({"model": {"family": "bert", "norm": "rms"}}, "model.family = bert has learned positions, LayerNorm, biases and a tied head"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas.1 = 1.5: input should be less than 1"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr = inf: input should be a finite number"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr = nan: input should be a finite number"),
        (
            {"data": {"document_mask": True}, "model": {"family": "bert"}},
            "a sample of model.family = bert is one padded pair; leave data.doc",
        ),
        ({"data": {"mask_fraction": 1.0}}, "data.mask_fraction = 1.0: input should be less than 1"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep = 0: input should be greater than 0"),
        ({"run": {"seed": -1}}, "run.seed = -1: input should be greater than or equal to 0"),
        ({"model": 3}, "model = 3: input should be a valid dictionary"),
        ({"train": {"steps": 2.5}}, "train.steps = 2.5"),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(document: dict[str, Any], words: str) -> None:
    assert words in _refusal(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {layers: 3", "is no YAML"),
        ("- a\n- b\n", "holds a list, but a run is a mapping of sections"),
        ("", "holds a NoneType, but a run is a mapping"),
        ("model:\n\t- layers", "is no YAML"),
    ],
)
def test_a_file_that_is_no_run_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        settings.load(_file(tmp_path, text))
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match=r"mine.yaml is no YAML: 'utf-8' codec"):
        settings.load(str(tmp_path / "mine.yaml"))


def test_a_section_that_is_none_is_refused_also_when_a_flag_sets_something_in_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model = 3: input should be a valid dictionary"):
        settings.load(_file(tmp_path, {"model": 3}), overrides={"model": {"layers": 4}})


def test_yaml_builds_no_python_objects(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no YAML"):
        settings.load(_file(tmp_path, f"name: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-tny", "no recipe is called 'gpt-tny'; did you mean gpt-tiny?; the recipes are bert-base"),
        ("nowhere.yaml", "run file nowhere.yaml does not exist; name a recipe"),
        ("zzz", "no recipe is called 'zzz'; the recipes are"),
    ],
)
def test_a_name_that_is_neither_recipe_nor_file_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.load(name)
    assert words in str(caught.value)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.steps = 3  # type: ignore[misc]


# ---- what a mesh must fit --------------------------------------------------------------------------------------------------------------


def _run(**sections: dict[str, Any]) -> Config:
    small = {
        "model": {"layers": 4, "width": 64, "heads": 4, "vocab": 100, "sequence": 16},
        "train": {"global_batch": 8, "micro_batch": 1, "precision": "fp32"},
    }
    return Config.model_validate({**small, **{name: {**small.get(name, {}), **values} for name, values in sections.items()}})


@pytest.mark.parametrize(
    ("sections", "world", "words"),
    [
        (
            {"mesh": {"dp": 2, "pp": 4, "tp": 2}},
            8,
            "mesh dp*pp*tp = 2*4*2 = 16, but 8 ranks were started; start 16 or change mesh.dp, mesh.pp or mesh.tp",
        ),
        ({"mesh": {"pp": 2}}, 7, "mesh dp*pp*tp = 3*2*1 = 6, but 7 ranks were started"),
        ({"mesh": {"pp": 4}}, 2, "mesh dp*pp*tp = 1*4*1 = 4, but 2 ranks were started"),
        (
            {"mesh": {"tp": 3}, "model": {"vocab": 99}},
            3,
            "model.heads = 4 is not divisible by mesh.tp = 3; lower mesh.tp to a divisor of 4",
        ),
        (
            {"mesh": {"tp": 4}, "model": {"kv_heads": 2}},
            4,
            "model.kv_heads = 2 is not divisible by mesh.tp = 4; lower mesh.tp to a divisor of 2",
        ),
        ({"mesh": {"pp": 7}}, 7, "mesh.pp = 7 stages, but 4 blocks, embedding and head make 6; lower mesh.pp"),
        (
            {"mesh": {"dp": 2}, "train": {"micro_batch": 3}},
            2,
            "train.global_batch = 8 is not divisible by mesh.dp x train.micro_batch = 2 x 3; choose a multiple of 6",
        ),
        (
            {"mesh": {"pp": 4}, "train": {"micro_batch": 4}},
            4,
            "2 microbatches (global_batch 8 / dp 1 / micro_batch 4) cannot fill mesh.pp = 4 stages under 1f1b; raise train.global_batch",
        ),
        ({"mesh": {"pp": 2, "cp": 2}}, 6, "mesh dp*pp*cp*tp = 1*2*2*1 = 4, but 6 ranks were started; start 4 or change mesh.dp"),
        (
            {"mesh": {"cp": 8}},
            8,
            "model.heads = 4 is not divisible by mesh.tp x mesh.cp = 1 x 8, but context-parallel ranks share out the heads; lower mesh.cp",
        ),
        (
            {"mesh": {"cp": 2}, "data": {"sequence": 15}},
            2,
            "data.sequence = 15 is not divisible by mesh.cp = 2, over which sequences are split; choose a multiple of 2",
        ),
        (
            {"mesh": {"cp": 2, "tp": 2}, "data": {"sequence": 14}, "train": {"sequence_parallel": True}},
            4,
            "data.sequence = 14 is not divisible by mesh.cp x mesh.tp = 2 x 2, over which sequences are split; choose a multiple of 4",
        ),
        ({"train": {"sequence_parallel": True}}, 1, "train.sequence_parallel cuts sequences over tensor-parallel ranks, but mesh.tp = 1"),
        ({"train": {"compile": True}, "mesh": {"tp": 2}}, 2, "no other rank has a part of, but mesh.tp = 2"),
        ({"train": {"compile": True}, "mesh": {"cp": 2}}, 2, "no other rank has a part of, but mesh.cp = 2"),
        ({"train": {"compile": True, "recompute": "selective"}}, 1, "selective cannot see into blocks of train.compile = true"),
        ({"train": {"recompute_layers": 2}}, 1, "train.recompute_layers = 2 is of no use with train.recompute = none"),
        ({"data": {"sequence": 17}}, 1, "data.sequence = 17 is longer than model.sequence = 16; lower data.sequence"),
        ({"mesh": {"tp": 4}, "model": {"vocab": 3}}, 4, "model.vocab = 3 is smaller than mesh.tp = 4; lower mesh.tp"),
        (
            {"mesh": {"tp": 2}, "model": {"vocab": 15}, "train": {"loss_pieces": 8}},
            2,
            "train.loss_pieces = 8 is more than a rank's 7 words of the vocabulary; lower train.loss_pieces",
        ),
        ({"model": {"rope_base": 5e5}}, 1, "model.rope_base = 500000.0 is read with model.positions = rope alone; set that, or leave"),
        ({"data": {"whole_word": True}}, 1, "data.whole_word = True is read with model.family = bert alone"),
        ({"data": {"mask_fraction": 0.3}}, 1, "data.mask_fraction = 0.3 is read with model.family = bert alone"),
        ({"data": {"corpus_vocab": 300}}, 1, "data.corpus_vocab = 300 is read with data.corpus alone"),
        ({"optimizer": {"decay_fraction": 0.1}}, 1, "optimizer.decay_fraction = 0.1 is read with optimizer.schedule = wsd alone"),
        ({"watch": {"window": 8}}, 1, "watch.window = 8 is read with watch.spike alone"),
        (
            {"watch": {"allowed": 2}},
            1,
            "watch.allowed = 2 is read with watch.bad_step = skip or rewind alone; set that, or leave watch.allowed",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_both_numbers_and_the_cure(sections: dict, world: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_mesh(_run(**sections), world)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "world"),
    [
        ({"mesh": {"pp": 6}}, 6),  # embedding, 4 blocks and head: one each
        ({"mesh": {"pp": 4}, "train": {"micro_batch": 4, "schedule": "gpipe"}}, 4),  # gpipe may run half empty
        ({"mesh": {"tp": 2}, "model": {"kv_heads": 2}}, 2),
        ({"data": {"sequence": 16}}, 1),
    ],
)
def test_a_mesh_at_its_limit_fits(sections: dict, world: int) -> None:
    assert resolve_mesh(_run(**sections), world).mesh.dp == 1


@given(dp=st.integers(1, 8), pp=st.integers(1, 4), tp=st.sampled_from([1, 2, 4]))
def test_dp_is_what_remains_of_the_ranks(dp: int, pp: int, tp: int) -> None:
    config = _run(mesh={"pp": pp, "tp": tp}, train={"global_batch": 8 * dp})
    resolved = resolve_mesh(config, dp * pp * tp)
    assert resolved.mesh.dp == dp
    assert config.mesh.dp is None, "a config is a value"
    assert resolve_mesh(resolved, dp * pp * tp) == resolved


# ---- the resolved config is a run file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.recipes())
def test_the_config_in_the_run_folder_loads_again_as_it_was(name: str, tmp_path: Path) -> None:
    overrides = {
        "run": {"folder": str(tmp_path / "run")},
        "data": {"train": ["a=0.25", "b"], "corpus": ["x", "y"]},
        "optimizer": {"betas": ["0.8", "0.9"], "lr": "1e-4", "eps": "1e-8"},
    }
    run = settings.load(name, overrides=overrides)
    pretrain.write_config(run)
    again = settings.load(str(tmp_path / "run/config.yaml"))
    assert again == run
    assert again.data.train == ("a=0.25", "b") and again.optimizer.betas == (0.8, 0.9)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"], "nothing half-written lies beside it"


@given(st.floats(1e-12, 10, exclude_min=True), st.floats(0, 1, exclude_max=True))
def test_no_number_changes_on_its_way_through_yaml(lr: float, beta: float) -> None:
    optimizer = Optimizer(lr=lr, betas=(beta, beta))
    assert Optimizer.model_validate(yaml.safe_load(yaml.safe_dump(optimizer.model_dump(mode="json")))) == optimizer


def test_a_run_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run.folder = .*/file/run cannot be written \(Not a directory\); choose another run.folder"):
        pretrain.write_config(Config.model_validate({"run": {"folder": str(tmp_path / "file/run")}}))
