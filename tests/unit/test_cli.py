"""The command line: flags become settings, help names every flag, and the exit code says who was wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite import cli, config, crew, flags, pretrain
from megalite.config import Config
from megalite.data import prepare as preparing
from megalite.data.prepare import Preparation
from megalite.errors import UserError
from megalite.flags import read_flags


def _read(line: str) -> dict[str, Any]:
    return read_flags(line.split(), Config)


def _parsed(line: str) -> Config:
    return Config.model_validate(_read(line))


def _refusal(line: str) -> str:
    with pytest.raises(UserError) as caught:
        _read(line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- flags -----------------------------------------------------------------------------------------------------------------------------


def test_a_dotted_flag_sets_a_field_of_a_section_and_dashes_are_underscores() -> None:
    assert _read("--mesh.tp 4 --train.global-batch 8 --train.global_batch 16") == {"mesh": {"tp": "4"}, "train": {"global_batch": "16"}}
    assert _parsed("--mesh.tp 4 --name mine --optimizer.lr 1e-3 --optimizer.min-lr=0").model_dump(include={"mesh", "name"}) == {
        "name": "mine",
        "mesh": {"dp": None, "pp": 1, "cp": 1, "tp": 4, "ranks": None},
    }


@pytest.mark.parametrize("line", ["--mesh.tp 4", "--mesh.tp=4"])
def test_a_value_stands_behind_a_space_or_an_equals_sign(line: str) -> None:
    assert _parsed(line).mesh.tp == 4


def test_a_list_takes_every_value_up_to_the_next_flag() -> None:
    assert _parsed("--data.train a b=0.5 c --mesh.tp 2").data.train == ("a", "b=0.5", "c")
    assert _parsed("--data.train=a,b").data.train == ("a,b",), "a comma may be part of a path"


def test_the_equals_sign_of_a_weight_is_not_the_equals_sign_of_a_flag() -> None:
    assert _parsed("--data.train=corpus=0.5").data.train == ("corpus=0.5",)


@pytest.mark.parametrize("line", ["--optimizer.betas 0.8 0.9", "--optimizer.betas 0.8,0.9", "--optimizer.betas=0.8,0.9"])
def test_numbers_of_a_list_are_separated_by_spaces_or_commas(line: str) -> None:
    assert _parsed(line).optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--log.tensorboard", True),
        ("--log.tensorboard true", True),
        ("--log.tensorboard=TRUE", True),
        ("--log.tensorboard false", False),
        ("--log.tensorboard=False", False),
        ("--log.no-tensorboard", False),
        ("--log.no_tensorboard", False),
        ("--log.no-tensorboard false", True),
    ],
)
def test_a_switch_takes_no_value_or_true_or_false_and_no_turns_it_off(line: str, value: bool) -> None:
    assert _parsed(line).log.tensorboard is value


def test_a_switch_leaves_the_next_flag_alone() -> None:
    assert _read("--log.tensorboard --mesh.tp 2") == {"log": {"tensorboard": True}, "mesh": {"tp": "2"}}


@pytest.mark.parametrize("value", ["yes", "1", "on", "", "flase"])
def test_a_switch_that_is_neither_true_nor_false_is_refused_and_not_taken_for_false(value: str) -> None:
    assert f"--log.tensorboard = {value!r}, but a switch is true or false" in _refusal(f"--log.tensorboard={value}")


def test_a_negative_number_is_a_value_and_no_flag() -> None:
    assert _read("--optimizer.lr -1") == {"optimizer": {"lr": "-1"}}
    assert _read("--optimizer.betas -0.5 -1e-3") == {"optimizer": {"betas": ["-0.5", "-1e-3"]}}


def test_a_value_that_starts_with_two_dashes_needs_the_equals_sign() -> None:
    assert _parsed("--run.folder=--odd").run.folder == "--odd"
    assert _refusal("--run.folder --odd") == "--run.folder needs a value"


@pytest.mark.parametrize("line", ["--deepspeed None", "--deepspeed=None"])
def test_none_leaves_a_setting_out(line: str) -> None:
    assert _read(line) == {"deepspeed": None}


def test_of_two_equal_flags_the_last_one_counts() -> None:
    assert _parsed("--mesh.tp 2 --mesh.tp 4").mesh.tp == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--mesh.tq 4", "--mesh.tq is no flag; did you mean --mesh.tp?"),
        ("--train.step 4", "--train.step is no flag; did you mean --train.steps?"),
        ("--mesh 4", "--mesh is no flag"),
        ("--steps 4", "--steps is no flag"),
        ("--train.no-steps", "--train.no-steps is no flag"),
        ("--mesh.tp", "--mesh.tp needs a value"),
        ("--mesh.tp --mesh.pp 2", "--mesh.tp needs a value"),
        ("--mesh.tp 4 5", "'5' is no flag and no value of one; flags begin with --"),
        ("-v", "'-v' is no flag and no value of one"),
        ("--", "-- is no flag"),
        ("--log.tensorboard yes", "'yes' is no flag and no value of one"),
    ],
)
def test_what_is_no_flag_is_refused_with_the_nearest_one(line: str, words: str) -> None:
    assert words in _refusal(line)


def test_every_setting_can_be_set_by_its_flag() -> None:
    """The default written as a flag gives the default."""
    words: list[str] = []
    for name, _ in flags.fields(Config):
        value: Any = Config()
        for part in name.split("."):
            value = getattr(value, part)
        values = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
        words += [f"--{name.replace('_', '-')}", *values]
    assert Config.model_validate(read_flags(words, Config)) == Config()


def test_inputs_of_prepare_stand_before_between_or_behind_the_flags() -> None:
    for line in (
        "a b --output o --tokenizer t",
        "--output o a --tokenizer t b",
        "--output o --split-sentences a b --tokenizer t",
        "--inputs a b --output o --tokenizer t",
    ):
        found = read_flags(line.split(), Preparation, positional="inputs")
        assert found["inputs"] == ["a", "b"], line


def test_the_splits_of_prepare_may_be_written_with_commas() -> None:
    line = "a --output o --tokenizer t --splits 0.9,0.1,0 --vocab-size 99"
    found = read_flags(line.split(), Preparation, positional="inputs")
    preparation = Preparation.model_validate(found)
    assert preparation.splits == (0.9, 0.1, 0.0) and preparation.vocab_size == 99


@pytest.mark.parametrize(("word", "value"), [("", True), ("True", True), ("False", False), ("None", None)])
def test_a_switch_that_may_be_left_out_takes_what_help_says(word: str, value: bool | None) -> None:
    line = f"a --output o --tokenizer t --split-sentences {word}"
    found = read_flags(line.split(), Preparation, positional="inputs")
    assert (found["split_sentences"], found["inputs"]) == (value, ["a"])


# ---- help and exit codes ---------------------------------------------------------------------------------------------------------------


def _exit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def _flat(text: str) -> str:
    """Help without its frame and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize(
    ("words", "schema"), [(("train", "--help"), Config), (("train", "gpt-tiny", "-h"), Config), (("prepare", "--help"), Preparation)]
)
def test_help_names_every_flag_and_explains_it(capsys: pytest.CaptureFixture[str], words: tuple, schema: type) -> None:
    code, out, err = _exit(capsys, *words)
    assert (code, err) == (0, "")
    said = out.split()
    for name, _ in flags.fields(schema):
        assert any(word.rstrip(",") == f"--{name.replace('_', '-')}" for word in said), name
    explained = "".join(_flat(out).split())
    for model in (schema, *(field.annotation for field in schema.model_fields.values() if hasattr(field.annotation, "model_fields"))):
        for name, field in model.model_fields.items():
            if not hasattr(field.annotation, "model_fields") and name != "task":
                assert field.description, f"{name} has no docstring"
                assert "".join(field.description.split()) in explained, name


def test_help_of_a_recipe_shows_what_the_recipe_sets(capsys: pytest.CaptureFixture[str]) -> None:
    run = config.load("gpt-tiny")
    _, out, _ = _exit(capsys, "train", "gpt-tiny", "--help")
    said = _flat(out)
    for flag, value in (
        ("--model.layers INT", run.model.layers),
        ("--model.width INT", run.model.width),
        ("--mesh.pp INT", run.mesh.pp),
        ("--optimizer.lr FLOAT", run.optimizer.lr),
        ("--deepspeed {None}|STR", run.deepspeed),
    ):
        assert f"(default: {value})" in said[said.index(flag) :].split(" --")[0], flag
    assert "usage: megalite train gpt-tiny" in said


VERBS = list(dict.fromkeys(re.findall(r"^  megalite (\w+)", cli.HELP, flags=re.MULTILINE)))


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_the_verbs_that_exist_and_every_recipe(capsys: pytest.CaptureFixture[str], words: tuple) -> None:
    assert _exit(capsys, *words) == (0, cli.HELP + "\n", "")
    assert all(name in cli.HELP for name in config.recipes())
    _, _, said = _exit(capsys, "no-such-verb")
    assert {"prepare", "train"} <= set(VERBS)
    assert said.endswith(f"; the verbs are {', '.join(VERBS)}\n"), "a verb is missing in help, or listed and not there"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_flags(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, err = _exit(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: megalite {verb} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "megalite has no verb 'trian'; did you mean train?; the verbs are prepare, train"),
        (("train",), "megalite train needs a recipe"),
        (("train", "--mesh.tp", "2"), "megalite train needs a recipe"),
        (("train", "gpt-tny"), "did you mean gpt-tiny?"),
        (("train", "gpt-tny", "--help"), "did you mean gpt-tiny?"),
        (("train", "gpt-tiny", "--mesh.tq", "2"), "did you mean --mesh.tp?"),
        (("train", "gpt-tiny", "--mesh.tp", "two"), "mesh.tp = 'two': input should be a valid integer"),
        (("train", "gpt-tiny", "--optimizer.lr", "-1"), "optimizer.lr = '-1': input should be greater than 0"),
        (("prepare",), "output is missing; tokenizer is missing; megalite prepare --help explains every flag"),
        (("prepare", "--output", "o", "--tokenizer", "train:bpe"), "megalite prepare got no input"),
        (("prepare", "a", "--output", "o", "--tokenizer", "train:bpe", "--splits", "1"), "splits"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(capsys: pytest.CaptureFixture[str], words: tuple, said: str) -> None:
    code, out, err = _exit(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("megalite: ") and err.count("\n") == 1 and said in err


def _raise(error: BaseException) -> Any:
    def work(*_: object, **__: object) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("too many"), 2, "megalite: too many\n"),
        (crew.RankError(3, "failed:\nTraceback of rank 3"), 1, "megalite: rank 3 failed:\nTraceback of rank 3\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_exit_code_says_who_was_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr(preparing, "prepare", _raise(error))
    assert _exit(capsys, "prepare", "a", "--output", "o", "--tokenizer", "t") == (code, "", said)


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "pretrain", _raise(ArithmeticError("ours")))
    with pytest.raises(ArithmeticError, match="ours"):
        cli.main(["train", "gpt-tiny"])


def test_train_gets_the_config_with_its_flags_and_the_line_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Config, str]] = []
    monkeypatch.setattr(pretrain, "pretrain", lambda run, *, command: seen.append((run, command)))
    cli.main(["train", "gpt-tiny", "--train.steps", "3", "--run.folder", "my runs/first"])
    ((run, command),) = seen
    assert run == config.load("gpt-tiny", overrides={"train": {"steps": 3}, "run": {"folder": "my runs/first"}})
    assert command.endswith("train gpt-tiny --train.steps 3 --run.folder 'my runs/first'"), "a shell would not read it back"


MEGALITE = Path(sys.executable).with_name("megalite")


@pytest.mark.parametrize("way", [[str(MEGALITE)], [sys.executable, "-m", "megalite"]], ids=["megalite", "python -m megalite"])
def test_script_and_module_are_the_same_program(way: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    shown = subprocess.run([*way, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stderr, shown.stdout) == (0, "", cli.HELP + "\n")
    wrong = subprocess.run([*way, "trian"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1 and "did you mean train?" in wrong.stderr


def test_a_wrong_flag_is_answered_without_importing_torch(tmp_path: Path) -> None:
    """So that a typing mistake costs a fraction of a second."""
    code = "import sys; from megalite import cli\ntry: cli.main(['train', 'gpt-tiny', '--mesh.tq', '2'])\nexcept SystemExit: pass\n"
    found = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "False\n"


def test_no_verb_imports_deepspeed_before_its_words_are_understood(tmp_path: Path) -> None:
    """It takes seconds, and says so on the console."""
    homes = ("pretrain", "finetune", "evaluate.judge", "evaluate.text", "evaluate.vectors", "tune.tuning", "tune.benching", "tune.verify")
    code = f"import sys, importlib; [importlib.import_module('megalite.' + name) for name in {homes}]; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
