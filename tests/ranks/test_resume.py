"""A run that was killed and resumed is, bit for bit, the run that was never stopped; and looking at a run does not change it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from runs import STEPS, finish, losses, make_shard, same_bits, train, wait_for
from runs import run_file as make_run


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shard(tmp_path_factory.mktemp("data"))


def test_killed_and_resumed_equals_never_stopped_bit_for_bit(shard: str, tmp_path: Path) -> None:
    run_file = make_run(tmp_path, shard)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(train(run_file, whole))

    process = train(run_file, broken)
    wait_for(process, (broken / "checkpoints/step-4/manifest.json").exists)
    process.kill()
    if (broken / "checkpoints/step-8").exists():  # a quick machine: let it take some steps again all the same
        pytest.fail("the run was over before it could be killed; make it longer")
    finish(train(run_file, broken))

    assert losses(broken) == losses(whole)
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))
    same_bits(broken / f"checkpoints/step-{STEPS}", whole / f"checkpoints/step-{STEPS}")


@pytest.mark.parametrize(
    "schedule", ["1f1b", *(pytest.param(schedule, marks=pytest.mark.slow) for schedule in ("interleaved", "zerobubble"))]
)
def test_validating_and_saving_changes_nothing(schedule: str, shard: str, tmp_path: Path) -> None:
    run_file = make_run(tmp_path, shard)
    document = yaml.safe_load(run_file.read_text())
    document["train"]["schedule"] = schedule
    run_file.write_text(yaml.safe_dump(document))
    finish(train(run_file, tmp_path / "often", "--validation.every", "1", "--checkpoint.every", "1"))
    finish(train(run_file, tmp_path / "never", "--validation.every", "0", "--checkpoint.every", "0"))
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_a_checkpoint_goes_on_on_another_mesh_and_zero_stage(shard: str, tmp_path: Path) -> None:
    """fp32 sums in another order differ in the last bits: 1e-5 of the loss."""
    run_file = make_run(tmp_path, shard)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finish(train(run_file, whole))
    finish(train(run_file, moved, "--train.steps", "8", "--checkpoint.every", "4"))
    shutil.rmtree(moved / "checkpoints/step-8")
    finish(train(run_file, moved, "--mesh.dp", "1", "--mesh.pp", "1", "--mesh.tp", "2", "--deepspeed", "zero1"))
    for step, (loss, norm, rate) in losses(moved).items():
        assert loss == pytest.approx(losses(whole)[step][0], rel=1e-5)
        assert norm == pytest.approx(losses(whole)[step][1], rel=1e-4)  # a norm gathers the differences of all weights
        assert rate == losses(whole)[step][2]


def test_a_finished_run_says_so_and_trains_nothing(shard: str, tmp_path: Path) -> None:
    run_file = make_run(tmp_path, shard)
    finish(train(run_file, tmp_path / "run"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert "nothing left to train" in finish(train(run_file, tmp_path / "run"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.layers", "3"), "layers = 2"),
        (("--train.global-batch", "16"), "train.global_batch = 8"),
        (("--run.seed", "5"), "run.seed = 1234"),
        (("--checkpoint.resume", "none"), "checkpoint.resume = none"),
        (("--checkpoint.resume", "/nowhere"), "holds checkpoints of its own"),
        (("--checkpoint.resume", "/nowhere", "--run.folder", "{fresh}"), "/nowhere is no checkpoint"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(
    shard: str, tmp_path_factory: pytest.TempPathFactory, flags: tuple, words: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "refused"
    folder.mkdir(exist_ok=True)
    run_file = make_run(folder, shard)
    if not (folder / "run/checkpoints").exists():
        finish(train(run_file, folder / "run", "--train.steps", "2"))
    process = train(run_file, folder / "run", *(flag.format(fresh=folder / "fresh") for flag in flags))
    output = finish(process, code=2)
    assert words in output and output.count("\n") == 1, output
