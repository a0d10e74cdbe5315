"""`megalite tune --score`: constants from tables of measured runs, and how far off predictions are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megalite.errors import UserError
from megalite.tune import cluster, fitting, runtime
from megalite.tune.score import Runs, predict_time, read_runs, score

TABLE = Path(__file__).parent / "tables/vtrain_multi_a100.csv"


def test_fitting_finds_constants_that_predict_a_table_made_by_others() -> None:
    """Not the same constants: in this table a slower product and a longer launch look alike."""
    plain = runtime.find("megatron-deepspeed")
    machines = cluster.find("64x8xa100-800g")
    runs = read_runs(TABLE, plain)
    truth = dataclasses.replace(plain, constants=dataclasses.replace(plain.constants, matmul=0.6, tp_inside=0.5, straggle=0.02))
    made = dataclasses.replace(runs, seconds=predict_time(runs, machines, truth))
    found = fitting.fit_time(made, machines, plain, freedom=3.0)
    assert np.abs(predict_time(made, machines, found) / made.seconds - 1).max() < 0.02


def test_runs_that_were_not_fitted_are_predicted_within_a_tenth() -> None:
    plain, machines = runtime.DESIGN["megatron-deepspeed"], cluster.find("64x8xa100-800g")
    runs = read_runs(TABLE, plain)
    seconds, held = fitting.hold_out(runs, machines, plain)
    found = score(runs, seconds, held, limit=machines.usable)
    assert found.timed == 62 and found.time_mean < 0.1 and found.top_five == 1.0


MPT = {"h100": 0.04, "a100-80": 0.055, "a100-40": 0.035}


def _mpt(kind: str) -> tuple[Runs, cluster.Cluster]:
    table = TABLE.with_name(f"llm_foundry_{kind.replace('-', '_')}.csv")
    return read_runs(table, runtime.DESIGN["fsdp"]), cluster.find(f"64x8x{kind}")


@pytest.mark.parametrize("kind", MPT)
def test_runs_of_fsdp_that_were_not_fitted_are_predicted(kind: str) -> None:
    runs, machines = _mpt(kind)
    seconds, held = fitting.hold_out(runs, machines, runtime.DESIGN["fsdp"])
    found = score(runs, seconds, held, limit=machines.usable)
    assert found.time_mean < MPT[kind] and found.false_misses == 0


@pytest.mark.parametrize(
    ("fitted", "other", "off"),
    [
        ("a100-80", "a100-40", 0.042),
        ("a100-40", "a100-80", 0.059),
        ("a100-80", "h100", 0.141),
        ("a100-40", "h100", 0.138),
        ("", "h100", 0.246),
        ("", "a100-80", 0.171),
        ("", "a100-40", 0.142),
    ],
)
def test_a_cluster_that_was_not_calibrated_is_predicted_as_docs_say(fitted: str, other: str, off: float) -> None:
    """By constants of another one, or by those that have seen no table: docs/design/tuning.md."""
    known = fitting.fit_time(*_mpt(fitted), runtime.DESIGN["fsdp"]) if fitted else runtime.DESIGN["fsdp"]
    runs, machines = _mpt(other)
    away = np.abs(predict_time(runs, machines, known) / runs.seconds - 1).mean()
    assert away == pytest.approx(off, abs=0.0006)  # the last digit of the page's figure


def test_a_run_that_failed_where_as_much_ran_did_not_fail_for_want_of_memory(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    head = "layers,hidden,heads,seq,mbs,gbs,dp,tp,pp,zero,tok_s_gpu,status\n"
    failed = [(1, 1, 4), (1, 2, 4), (1, 1, 8), (2, 0, 4), (4, 1, 4)]  # microbatch, ZeRO, data parallelism
    lines = [f"4,512,8,512,{micro},64,{dp},1,1,{zero},,fail\n" for micro, zero, dp in failed]
    table.write_text(head + "4,512,8,512,2,64,4,1,1,1,1000,ok\n" + "".join(lines))
    runs = read_runs(table, runtime.find("nanotron"))
    nothing = np.zeros(6)  # all are said to fit
    found = score(runs, nothing + 1, nothing, limit=1.0)
    assert found.false_fits == 5 / 6
    assert found.false_memory == 2 / 6  # less ZeRO than in the one that ran, and more in a microbatch


def test_a_table_without_a_needed_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("layers,hidden,heads,seq,mbs\n1,2,1,4,1\n")
    with pytest.raises(UserError, match="has no column gbs"):
        read_runs(path, runtime.DESIGN["nanotron"])
    path.write_text("layers,hidden,heads,seq,mbs,gbs,dp,iter_ms\n1,2,1,4,1,8,1,fast\n")
    with pytest.raises(UserError, match="iter_ms = 'fast' is no number"):
        read_runs(path, runtime.DESIGN["nanotron"])
