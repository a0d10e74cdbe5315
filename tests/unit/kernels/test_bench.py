"""The bench and the sweep: a clear sentence without a GPU, tables that say what was measured, medians taken in turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megalite_kernels import bench, sweep
from megalite_kernels.clock import measure
from megalite_kernels.tables import read_tables

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")


@without_gpu
@pytest.mark.parametrize("module", [bench, sweep])
def test_without_a_gpu_it_says_so_in_one_line(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main([]) == 2  # type: ignore[attr-defined]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "there is no GPU" in said


def test_calls_are_timed_in_turn_and_one_that_fails_is_left_out() -> None:
    order: list[str] = []

    def fail() -> None:
        raise RuntimeError("not for this shape")

    times = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fail}, device=CPU, rounds=3, warm_up=1)
    assert list(times) == ["a", "b"] and all(seconds >= 0 for seconds in times.values())
    assert "".join(order) == "ab" + "ababab"
    with pytest.raises(RuntimeError, match="not for this shape"):
        measure({"ours": fail}, device=CPU, required=("ours",))


@pytest.mark.filterwarnings("ignore:attention runs in plain PyTorch")
@pytest.mark.parametrize("backward", [False, True])
def test_a_row_counts_what_is_seen(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(bench, "_flex", lambda q, k, v, seen: lambda: q + k + v)
    row = bench.dense(64, 32, causal=True, device=CPU, backward=backward)
    assert {"ours", "flash", "flex"} <= set(row.seconds) and "cudnn" not in row.seconds
    assert row.work == 4 * 2 * 32 * 64 * (32 * 33 // 2) * (2.5 if backward else 1)


def test_a_row_of_the_loss_counts_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda way: way)
    row = bench.loss(8, 64, 16, device=CPU)
    assert set(row.seconds) == {"ours", "eager", "compiled"} and row.work == 6 * 8 * 64 * 16 and not row.memory


def test_a_row_of_dropout_counts_each_operand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda way: way)
    monkeypatch.setattr(bench, "TOKENS", 64)
    row = bench.dropped(16, device=CPU)
    assert set(row.seconds) == {"ours", "eager", "compiled", "torch"} and row.work == 5 * 2 * 64 * 16 and not row.memory
    assert bench.table([row], unit="GB/s").startswith("| GB/s | ours | eager | compiled | torch | ours / P |")


def test_memory_stands_beside_the_rate() -> None:
    row = bench.Row("loss", 1e12, {"ours": 0.5, "eager": 0.25}, {"ours": 500_000_000, "eager": 12 * 10**9})
    assert bench.table([row]).splitlines()[-1] == "| loss | 2 (0.50 GB) | 4 (12.00 GB) | 0.50 |"


def test_the_table_is_ours_over_the_best_peer() -> None:
    row = bench.Row("forward", 1e12, {"ours": 0.5, "cudnn": 0.25, "flash": 1.0})
    assert row.ratio() == 0.5
    assert bench.table([row]).splitlines()[-1] == "| forward | 2 | 4 | 1 | 0.50 |"


def test_a_sweep_writes_the_tables_it_reads(tmp_path: Path) -> None:
    document = json.loads(sweep.TABLES.read_text())
    sweep.write(document, tmp_path / "tables.json")
    assert json.loads((tmp_path / "tables.json").read_text()) == document


def test_what_is_in_the_tables_is_among_the_candidates() -> None:
    for arch, kernels in read_tables().items():
        for kernel in {"forward", "by_keys_fused", "by_keys", "by_rows"} & set(kernels) if arch != "interpreter" else ():
            for kinds in kernels[kernel].values():
                for kind, tile in kinds.items():
                    assert tile in sweep.candidates(arch, kind)
