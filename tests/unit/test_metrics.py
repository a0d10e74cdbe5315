"""A run's metrics are whole, honest about time, and hold every step once, however often the run was killed."""

import json
import time

import pytest
import torch

from megalite.config import Log
from megalite.observe.metrics import Metrics, Yardstick

YARDSTICK = Yardstick(tokens_per_step=1000, flops_per_step=4e9, peak_flops=1e12)
KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "memory_bytes",
    "seconds",
}  # fmt: skip


def _metrics(folder, *, rank=0, world=2, total_steps=20, every=5, tensorboard=False, start_step=0, yardstick=YARDSTICK) -> Metrics:
    log = Log(every=every, tensorboard=tensorboard)
    return Metrics(folder, rank=rank, world=world, total_steps=total_steps, yardstick=yardstick, log=log, start_step=start_step)


def _train(metrics: Metrics, first: int, last: int, *, seconds: float = 0.0) -> None:
    for step in range(first, last + 1):
        time.sleep(seconds)
        metrics.step(step, loss=10.0 / step, grad_norm=torch.tensor(0.5), lr=1e-3)


def _lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_written_at_the_first_at_every_fifth_and_at_the_last_step(tmp_path):
    with _metrics(tmp_path, total_steps=12) as metrics:
        _train(metrics, 1, 12)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 5, 10, 12]
    assert all(set(line) == KEYS for line in _lines(tmp_path))


def test_a_line_holds_that_steps_loss_and_the_tokens_so_far(tmp_path):
    with _metrics(tmp_path) as metrics:
        _train(metrics, 1, 10)
    line = _lines(tmp_path)[-1]
    assert (line["loss"], line["grad_norm"], line["lr"], line["tokens"]) == (1.0, 0.5, 1e-3, 10_000)
    assert line["memory_bytes"] > 1 << 20


def test_rates_follow_from_tokens_flops_seconds_and_ranks(tmp_path):
    with _metrics(tmp_path, world=2) as metrics:
        _train(metrics, 1, 5, seconds=0.01)
    line = _lines(tmp_path)[-1]
    assert 0.01 <= line["seconds"] < 0.03
    assert line["tokens_per_second"] == pytest.approx(1000 / line["seconds"])
    assert line["tokens_per_second_per_gpu"] == pytest.approx(line["tokens_per_second"] / 2)
    assert line["tflops_per_gpu"] == pytest.approx(4e9 / 2 / line["seconds"] / 1e12)
    assert line["mfu"] == pytest.approx(line["tflops_per_gpu"] / 1.0)


def test_without_a_known_peak_mfu_is_null(tmp_path):
    with _metrics(tmp_path, yardstick=Yardstick(1000, 4e9, None)) as metrics:
        _train(metrics, 1, 5)
    assert {line["mfu"] for line in _lines(tmp_path)} == {None}


def test_a_pause_does_not_count(tmp_path):
    with _metrics(tmp_path) as metrics:
        _train(metrics, 1, 3)
        with metrics.pause():
            time.sleep(0.5)
        _train(metrics, 4, 5)
    assert _lines(tmp_path)[-1]["seconds"] < 0.1


def test_a_validation_has_its_own_line(tmp_path):
    with _metrics(tmp_path) as metrics:
        _train(metrics, 1, 5)
        metrics.valid(5, torch.tensor(2.5))
    assert _lines(tmp_path)[-1] == {"step": 5, "valid_loss": 2.5}


def test_losses_are_read_only_when_a_line_is_due(tmp_path):
    class Busy:
        read = 0

        def __float__(self) -> float:
            Busy.read += 1
            return 1.0

    with _metrics(tmp_path) as metrics:
        for step in range(1, 11):
            metrics.step(step, loss=Busy(), grad_norm=None, lr=0.0)
    assert Busy.read == 3  # steps 1, 5 and 10


def test_a_loss_that_is_not_finite_leaves_valid_json(tmp_path):
    with _metrics(tmp_path) as metrics:
        metrics.step(1, loss=float("nan"), grad_norm=torch.tensor(float("inf")), lr=0.0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (_lines(tmp_path)[0]["loss"], _lines(tmp_path)[0]["grad_norm"]) == (None, None)


def test_after_a_kill_every_step_appears_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), _metrics(tmp_path) as metrics:
        _train(metrics, 1, 10)
        metrics.valid(10, 1.0)
        _train(metrics, 11, 17)
        metrics.valid(15, 9.0)
        raise KeyboardInterrupt
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # killed in the middle of a line
    with _metrics(tmp_path, start_step=10) as metrics:
        _train(metrics, 11, 20)
    assert [line["step"] for line in _lines(tmp_path) if "loss" in line] == [1, 5, 10, 15, 20]
    assert [line for line in _lines(tmp_path) if "valid_loss" in line] == [{"step": 10, "valid_loss": 1.0}]
    assert _lines(tmp_path)[-1]["tokens"] == 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    for _ in range(2):
        with _metrics(tmp_path) as metrics:
            _train(metrics, 1, 5)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 5]


def test_tensorboard_holds_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, last, loss in ((0, 15, 1.0), (10, 20, 2.0)):
        with _metrics(tmp_path, tensorboard=True, start_step=start) as metrics:
            for step in range(start + 1, last + 1):
                metrics.step(step, loss=loss, grad_norm=1.0, lr=0.1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]


def test_only_rank_0_writes_and_speaks(tmp_path, capsys):
    with _metrics(tmp_path, rank=1) as metrics:
        _train(metrics, 1, 5)
        metrics.valid(5, 1.0)
        with metrics.pause():
            pass
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_without_a_terminal_lines_are_plain_aligned_and_whole(tmp_path, capsys):
    with _metrics(tmp_path, total_steps=100) as metrics:
        _train(metrics, 1, 5, seconds=0.001)
        metrics.valid(5, 2.5)
    first, fifth, valid, summary = capsys.readouterr().out.splitlines()
    assert first.startswith("step   1/100  loss 10.0000  norm  0.500  lr 1.00e-03")
    assert fifth.startswith("step   5/100  loss 2.0000")
    assert " tokens/s" in fifth
    assert " left" in fifth
    assert valid == "step   5/100  validation loss 2.5000"
    assert summary.startswith("5 steps, 5,000 tokens: ")
    assert "\x1b" not in first + fifth + valid + summary
