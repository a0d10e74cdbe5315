"""What every step got done: loss, gradient norm, tokens a second, FLOP/s and memory, on the console, in JSONL and in TensorBoard.

In: a number or a scalar tensor a step, read only when a line is due, so that steps in between never wait for the GPU.  Out:
folder/metrics.jsonl with one object a logged step and one a validation, folder/tensorboard, and lines on rank 0's console, beside a live
bar where that is a terminal. A line is due at step 1, at every `log.every`-th and at the last step. Its rates are those of the time since
the line before, less what was spent in `pause()`. MFU is the model's FLOPs over seconds and a GPU's peak, and null where that peak is
unknown (a CPU). A loss or norm that is not finite is written as null: JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalite.config import Log
from megalite.log import open_console


@dataclass(frozen=True)
class Yardstick:
    """What a step amounts to over the whole mesh, and what one GPU could do at best."""

    tokens_per_step: int
    flops_per_step: float
    peak_flops: float | None  # of one GPU; None: unknown


class Metrics:
    """Use as `with Metrics(...) as metrics:` on every rank; all but rank 0 keep silent and cost nothing."""

    def __init__(self, folder: str | Path, *, rank: int, world: int, total_steps: int, yardstick: Yardstick, log: Log, start_step: int = 0):
        self.folder, self.speaks, self.world = Path(folder), rank == 0, world
        self.total_steps, self.start_step = total_steps, start_step
        self.yardstick, self.log = yardstick, log
        self.clock = _Clock(start_step)
        self.closing = contextlib.ExitStack()

    def __enter__(self) -> Metrics:
        if not self.speaks:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        drop_later(path, self.start_step)
        with contextlib.ExitStack() as opening:
            self.lines = opening.enter_context(path.open("a", buffering=1))
            self.board = opening.enter_context(_board(self.folder, self.start_step)) if self.log.tensorboard else None
            self.console = open_console()
            self.bar = opening.enter_context(_bar(self.console)) if self.console.is_terminal else None
            self.task = self.bar and self.bar.add_task("", total=self.total_steps, completed=self.start_step, now="")
            self.closing = opening.pop_all()
        self.began, self.clock = time.perf_counter(), _Clock(self.start_step)
        self.last: dict[str, Any] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.close()
        if self.speaks and kind is None and self.last:
            self._sum_up()

    def step(self, step: int, *, loss: Any, grad_norm: Any, lr: float) -> None:
        """One optimizer step is done. Costs nothing unless a line is due."""
        if not self.speaks:
            return
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=step)
        if step % self.log.every and step not in (1, self.total_steps):
            return
        loss, grad_norm = _finite(loss), _finite(grad_norm)  # waits for the GPU, so the clock is read after it
        steps, seconds = self.clock.lap(step)
        self.last = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": float(lr), **self._rates(step, steps / seconds)}
        self._write(self.last)
        self._print(_line(self.last, self.total_steps, self.world))
        if self.bar and self.task is not None:
            self.bar.update(self.task, now=f"loss {_number(loss, '.4f')}  {self.last['tokens_per_second']:,.0f} tokens/s")

    def skipped(self, step: int, loss_scale: float | None) -> None:
        """A step changed nothing: gradients overflowed in fp16, where the loss scale is `loss_scale` from now on, or were refused."""
        if self.speaks:
            self._write({"step": step, "skipped": 1, **({} if loss_scale is None else {"loss_scale": loss_scale})})
            self._print(f"step {step}: update left out" + ("" if loss_scale is None else f"; loss scale {loss_scale:g}"))

    def valid(self, step: int, valid_loss: Any, scores: dict[str, Any] | None = None) -> None:
        """A validation after that step is done; scores are those of a task."""
        if not self.speaks:
            return
        numbers = {name: float(score) for name, score in (scores or {}).items() if isinstance(score, (int, float)) and name != "loss"}
        entry = {"step": step, "valid_loss": _finite(valid_loss), **numbers}
        self._write(entry)
        width = len(str(self.total_steps))
        said = "".join(f"  {name} {score:.4f}" for name, score in numbers.items())
        self._print(f"step {step:>{width}}/{self.total_steps}  validation loss {_number(entry['valid_loss'], '.4f')}{said}")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (validation, a checkpoint) does not count as training time."""
        with self.clock.pause():
            yield

    def _rates(self, step: int, steps_per_second: float) -> dict[str, Any]:
        measure = self.yardstick
        tokens = measure.tokens_per_step * steps_per_second
        flops = measure.flops_per_step * steps_per_second / self.world
        return {
            "tokens": step * measure.tokens_per_step,
            "tokens_per_second": tokens,
            "tokens_per_second_per_gpu": tokens / self.world,
            "tflops_per_gpu": flops / 1e12,
            "mfu": flops / measure.peak_flops if measure.peak_flops else None,
            "memory_bytes": _memory(),
            "seconds": 1 / steps_per_second,
        }

    def _write(self, entry: dict[str, Any]) -> None:
        self.lines.write(json.dumps(entry, allow_nan=False) + "\n")
        if self.board:
            for name, value in entry.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, entry["step"])
            self.board.flush()

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False)

    def _sum_up(self) -> None:
        done = self.last["step"] - self.start_step
        tokens = done * self.yardstick.tokens_per_step
        training = self.clock.trained
        paused = time.perf_counter() - self.began - training
        rate = f"{tokens / training:,.0f} tokens/s" + (f", {tokens / training / self.world:,.0f} a rank" if self.world > 1 else "")
        mean = self.yardstick.flops_per_step * done / training / self.world
        mfu = f", MFU {mean / self.yardstick.peak_flops:.1%}" if self.yardstick.peak_flops else ""
        times = f"{_clock_face(training)} of training and {_clock_face(paused)} of validation and saving"
        self._print(f"{done} steps, {tokens:,} tokens: {times}; {rate}{mfu}")


class _Clock:
    """Training time between two lines, less what was paused."""

    def __init__(self, step: int):
        self.step, self.since, self.paused, self.trained = step, time.perf_counter(), 0.0, 0.0

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap."""
        now = time.perf_counter()
        steps, seconds = step - self.step, max(now - self.since - self.paused, 1e-9)
        self.step, self.since, self.paused, self.trained = step, now, 0.0, self.trained + seconds
        return steps, seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - began


def drop_later(path: Path, step: int) -> None:
    """Take out of a metrics file what a killed run wrote after the checkpoint of `step`, and a line it left half-written."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    fresh = path.with_suffix(".jsonl.new")
    with fresh.open("w") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _board(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # seconds of imports, which a run without it is spared

    # TensorBoard itself then drops what an earlier run wrote from this step on
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)


def _bar(console: Any) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn(elapsed_when_finished=True))
    return Progress(*columns, console=console, transient=True)


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _memory() -> int:
    """Peak bytes of tensors on this rank's GPU; on a CPU the resident bytes of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _line(entry: dict[str, Any], total: int, world: int) -> str:
    width = len(str(total))
    per_rank = f" ({entry['tokens_per_second_per_gpu']:>7,.0f} a rank)" if world > 1 else ""
    mfu = "" if entry["mfu"] is None else f"  MFU {entry['mfu']:.1%}"
    left = _clock_face((total - entry["step"]) * entry["seconds"])
    return (
        f"step {entry['step']:>{width}}/{total}  loss {_number(entry['loss'], '.4f')}  norm {_number(entry['grad_norm'], '6.3f')}  "
        f"lr {entry['lr']:.2e}  {entry['tokens_per_second']:>9,.0f} tokens/s{per_rank}  {entry['tflops_per_gpu']:.3f} TFLOP/s{mfu}  "
        f"{entry['memory_bytes'] / 2**30:.2f} GiB  {left} left"
    )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _clock_face(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
