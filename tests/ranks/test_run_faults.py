"""What befalls a run: it ends in good order, says what happened, and goes on with the same bits. Real runs, started as a person does."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from runs import STEPS, finish, losses, make_shard, run_file, same_bits, train, wait_for

from megalite.checkpoint import manifest, store
from megalite.checkpoint.inspection import inspect
from megalite.pretrain import UNFINISHED

PAIR = {"mesh": {"dp": 2}}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(shard: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    finish(train(run_file(folder, shard, **PAIR), folder / "run"))
    return folder / "run"


def _has_step(folder: Path, step: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def _same_end(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    same_bits(folder / f"checkpoints/step-{STEPS}", whole / f"checkpoints/step-{STEPS}")


SLOWLY = """
import megalite.engine as e, time
plain = e.Engine.step
def slow(*a, **k):
    time.sleep(0.2)
    return plain(*a, **k)
e.Engine.step = slow
"""


# ---- signals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, "parent"), (signal.SIGUSR1, "rank 1")])
def test_a_run_that_is_asked_to_end_saves_exits_with_75_and_goes_on_with_the_same_bits(
    shard: str, whole: Path, tmp_path: Path, number: signal.Signals, to: str
) -> None:
    path = run_file(tmp_path, shard, **PAIR)
    process = train(path, tmp_path / "run", "--checkpoint.every", "0", before=SLOWLY)
    wait_for(process, lambda: _has_step(tmp_path / "run", 2))
    os.kill(process.pid if to == "parent" else process.ranks()[1].pid, number)
    output = finish(process, code=UNFINISHED)
    assert f"{number.name}: saved, and ended with exit code 75; the same command goes on from there" in output
    (saved,) = store.whole(tmp_path / "run/checkpoints")
    assert 2 <= manifest.read_facts(saved)["step"] < STEPS and not inspect(saved).damage
    finish(train(path, tmp_path / "run", "--checkpoint.every", "0"))
    _same_end(tmp_path / "run", whole)


def test_a_run_that_is_asked_before_it_began_ends_at_once(shard: str, tmp_path: Path) -> None:
    process = train(run_file(tmp_path, shard, **PAIR), tmp_path / "run")
    wait_for(process, lambda: process.ranks())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, UNFINISHED)  # or the ranks were listening already, and saved


# ---- a rank that hangs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_rank_is_named_by_the_others_with_what_it_did_within_the_stated_time(
    shard: str, whole: Path, tmp_path: Path, culprit: int
) -> None:
    path = run_file(tmp_path, shard, **PAIR)
    process = train(path, tmp_path / "run", "--watch.hang", "4", before=SLOWLY.replace("0.2", "1.0"))  # slower than the beat
    wait_for(process, lambda: _has_step(tmp_path / "run", 3))
    ranks, began = process.ranks(), time.monotonic()
    ranks[culprit].suspend()
    output = finish(process, code=1)
    assert time.monotonic() - began < 4 + 1 + 4 + 4  # patience, a beat, a store that waits for its keeper, the end of all ranks
    said = rf"rank {1 - culprit} sees no sign of life of rank {culprit} for 4 s \(watch.hang\)"
    assert re.search(said + r"(; it was in: (step|saving|validation)[^;]*)?; rank \d waits in: (step|saving|validation)", output), output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    finish(train(path, tmp_path / "run"))
    _same_end(tmp_path / "run", whole)


# ---- killed ----------------------------------------------------------------------------------------------------------------------------


def kill_at(path: Path, folder: Path, *, seconds: float, rank: int | None) -> int:
    """Start or go on with a run, and kill one rank or everything `seconds` after it has its ranks; its newest whole step (0: none)."""
    process = train(path, folder, "--checkpoint.every", "1", "--checkpoint.keep", "1")
    wait_for(process, lambda: process.poll() is not None or _has_step(folder, 1))
    time.sleep(seconds)
    if process.poll() is None:
        ranks = process.ranks()
        if rank is None or rank >= len(ranks):
            process.kill()
        else:
            ranks[rank].kill()
    process.communicate(timeout=60)
    found = store.whole(folder / "checkpoints")
    assert not [fault for path in found for fault in inspect(path).damage]
    return manifest.read_facts(found[-1])["step"] if found else 0


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 100))])
def test_killed_again_and_again_it_ends_with_the_same_bits(shard: str, whole: Path, tmp_path: Path, seed: int) -> None:
    draw, path = random.Random(seed), run_file(tmp_path, shard, **PAIR)
    reached = 0
    for rank in (None, seed % 2):
        now = kill_at(path, tmp_path / "run", seconds=draw.uniform(0, 0.3), rank=rank)
        assert now >= reached, "work that was saved is lost"
        reached = now
    finish(train(path, tmp_path / "run"))
    _same_end(tmp_path / "run", whole)


# ---- damage ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    ["a flipped bit", "torn latest", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut short", "missing", "torn manifest"))],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_the_run_ends_with_the_same_bits(
    shard: str, whole: Path, tmp_path: Path, how: str
) -> None:
    path = run_file(tmp_path, shard, **PAIR)
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    newest = tmp_path / f"run/checkpoints/step-{STEPS}"
    file = newest / "__1_0.distcp"
    if how == "a flipped bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
    elif how == "cut short":
        os.truncate(file, 100)
    elif how == "missing":
        file.unlink()
    elif how == "torn manifest":
        (newest / "manifest.json").write_text('{"format": 1')
    else:
        (tmp_path / "run/checkpoints/latest").unlink()
        (tmp_path / "run/checkpoints/latest").symlink_to("step-")
    output = finish(train(path, tmp_path / "run", "--train.steps", f"{STEPS + 1}"))
    if how == "torn latest":
        assert "warning" not in output and (tmp_path / "run/checkpoints/latest").resolve().name == f"step-{STEPS + 1}"
    else:
        assert "warning: checkpoint file" in output and "taking an older one" in output and f"step-{STEPS}/" in output
    assert {step: at for step, at in losses(tmp_path / "run").items() if step <= 6} == {
        step: at for step, at in losses(whole).items() if step <= 6
    }


def test_a_second_job_in_the_same_folder_is_refused(shard: str, tmp_path: Path) -> None:
    path = run_file(tmp_path, shard, **PAIR)
    first = train(path, tmp_path / "run", before=SLOWLY)
    wait_for(first, lambda: _has_step(tmp_path / "run", 1))
    before = (tmp_path / "run/config.yaml").read_bytes()
    output = finish(train(path, tmp_path / "run", "--optimizer.lr", "1"), code=2)
    assert f"is in use by process {first.pid} on" in output and output.count("\n") == 1
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    finish(first)


# ---- bad steps -------------------------------------------------------------------------------------------------------------------------

SPOIL = """
import megalite.engine as e, torch
plain = e.Engine.step
def step(self, number, microbatches):
    ids = sum(int(batch["ids"].sum()) for batch in microbatches)
    self.zero.before_update = lambda pieces: [piece.gradient.fill_({value}) for piece in pieces] if ids in {bad} else None
    return plain(self, number, microbatches)
e.Engine.step = step
"""


WITHOUT = """
import megalite.data.loader as l
plain = l.Loader._read
l.Loader._read = lambda self, n: plain(self, n + 2 * (n >= 4))
"""


def _bad_batch(shard: str, number: int) -> list[int]:
    """What tells the ranks' parts of a batch, by the sum of their tokens: the fault stays with the batch, whatever step takes it."""
    from megalite.config import Data, Model
    from megalite.data.loader import Loader, open_train

    opened = open_train(Data(train=(shard,)), model=Model(vocab=64, sequence=16), seed=1234)
    sums = []
    for rank in (0, 1):
        with Loader(opened.source, global_batch=8, micro_batch=2, dp=2, dp_rank=rank) as loader:
            sums.append(sum(int(batch["ids"].sum()) for batch in loader.step(number)))
    return sums


def _kinds(folder: Path) -> dict[str, list[int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {kind: [line["step"] for line in lines if kind in line] for kind in ("loss", "skipped")}


@pytest.mark.parametrize(("zero", "precision"), [("zero1", "bf16"), ("zero3", "fp32")])
def test_an_update_that_is_not_finite_is_left_out_counted_and_survives_resuming(
    shard: str, tmp_path: Path, zero: str, precision: str
) -> None:
    settings = {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "precision": precision}
    path = run_file(tmp_path, shard, **PAIR, deepspeed=zero, train=settings)
    spoil = SPOIL.format(value="float('nan')", bad=_bad_batch(shard, 4))
    output = finish(train(path, tmp_path / "run", "--watch.bad_step", "skip", before=spoil))
    assert "gradient norm nan: update left out, number 1 of the run" in output
    assert _kinds(tmp_path / "run") == {"loss": [*range(1, 9)], "skipped": [5]}
    assert manifest.read_facts(tmp_path / "run/checkpoints/step-8")["guard"]["skipped"] == 1

    for step in (8, 6):  # and the same again from a checkpoint after it: AdamW's count must not count the step that was left out
        (tmp_path / f"run/checkpoints/step-{step}").rename(tmp_path / f"step-{step}")
    (tmp_path / "step-6").rename(tmp_path / "run/checkpoints/step-6")
    finish(train(path, tmp_path / "run", "--watch.bad_step", "skip", before=spoil))
    same_bits(tmp_path / "run/checkpoints/step-8", tmp_path / "step-8")


def test_a_bad_batch_is_gone_back_over_and_left_out(shard: str, tmp_path: Path) -> None:
    """The batch of step 6 is bad: back to step 4, and on with the batches after it, as a run would that never had batches 4 and 5."""
    path = run_file(tmp_path, shard, **PAIR)
    spoil = SPOIL.format(value="float('nan')", bad=_bad_batch(shard, 5))
    output = finish(train(path, tmp_path / "run", "--watch.bad_step", "rewind", before=spoil))
    assert (
        "step 6: gradient norm nan; back to step 4, leaving out 2 batches, time 1" in output or "step 6: loss nan; back to step 4" in output
    )
    assert _kinds(tmp_path / "run") == {"loss": [*range(1, 9)], "skipped": []}
    guard = manifest.read_facts(tmp_path / "run/checkpoints/step-8")["guard"]
    assert (guard["shift"], guard["rewound"]) == (2, 1)

    finish(train(path, tmp_path / "other", "--validation.every", "0", before=WITHOUT))
    same_bits(tmp_path / "run/checkpoints/step-8", tmp_path / "other/checkpoints/step-8")


SLOW = """
import time
import megalite.checkpoint.store as store
publish = store._publish
store._publish = lambda *words: (time.sleep(1.5), publish(*words))[1]
"""


def test_without_a_rule_a_step_that_is_not_finite_ends_the_run_in_one_line(shard: str, tmp_path: Path) -> None:
    """And the save that is under way then is finished."""
    spoil = SPOIL.format(value="float('nan')", bad=_bad_batch(shard, 4))
    output = finish(train(run_file(tmp_path, shard, **PAIR), tmp_path / "run", before=spoil + SLOW), code=2)
    assert "megalite: step 5: gradient norm nan; lower optimizer.lr" in output
    assert [path.name for path in store.whole(tmp_path / "run/checkpoints")] == ["step-2", "step-4"]
