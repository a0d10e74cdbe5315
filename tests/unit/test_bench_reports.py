"""What `megalite bench` says of seconds that were measured, and what a sweep makes of runs that fail."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from megalite import config as settings
from megalite.errors import UserError
from megalite.models import counts
from megalite.tune import benching, cases, network, report
from megalite.tune.bench import _link, layout, predicted, summarise


def _result(seconds: list[float], *, device: str = "NVIDIA H100 80GB HBM3", **overrides: object) -> dict[str, object]:
    config = settings.load("gpt-1.3b", overrides=dict(overrides))
    return summarise(config, seconds, world=8, device=device, memory=3 * 2**30, shares={"compute and the rest": 1.0})


def test_figures_follow_from_seconds_and_the_formulas() -> None:
    found = _result([2.0, 4.0, 3.0])
    config = settings.load("gpt-1.3b")
    flops = counts.step_flops(config.model, config.sequence, 512)
    assert found["tokens_per_second"] == 512 * 2048 / 3
    assert found["tokens_per_second_per_gpu"] == 512 * 2048 / 3 / 8
    assert found["tflops_per_gpu"] == pytest.approx(flops / 3 / 8 / 1e12)
    assert found["mfu"] == found["hfu"] == pytest.approx(flops / 3 / 8 / 989.4e12)
    scores = 3 * 512 * 24 * 4 * 2048**2 * 2048
    assert found["tflops_per_gpu_causal"] == pytest.approx((flops - scores / 2) / 3 / 8 / 1e12)


def test_full_recomputation_raises_hfu_by_the_blocks_forward_pass_and_leaves_mfu() -> None:
    plain, again = _result([3.0]), _result([3.0], train={"recompute": "full"})
    costs = counts.layer_costs(settings.load("gpt-1.3b").model, 2048)
    assert again["mfu"] == plain["mfu"]
    assert again["hfu"] / again["mfu"] == pytest.approx(1 + 24 * costs[1] / (3 * sum(costs)))  # type: ignore[operator]
    assert _result([3.0], train={"recompute": "selective"})["hfu"] == plain["hfu"]


def test_a_cpu_has_no_mfu() -> None:
    assert _result([3.0], device="AMD EPYC")["mfu"] is None


def test_results_are_written_in_four_forms_and_read_back(tmp_path: Path) -> None:
    failed = {"name": "gpt-1.3b", "layout": "mesh.tp=3", "status": "refused", "reason": "heads <16> | no"}
    results = [_result([3.0, 3.2]), failed]
    report.write(results, tmp_path)
    assert report.read(str(tmp_path / "results.json")) == json.loads(json.dumps(results))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["status"] for row in rows] == ["ok", "refused"] and float(rows[0]["step_s"]) == 3.1
    page = (tmp_path / "results.html").read_text()
    assert "heads &lt;16&gt;" in page and "<svg" in page and "http" not in page
    assert "heads <16> / no" in (tmp_path / "results.md").read_text()


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path: Path) -> None:
    config = settings.load("gpt-1.3b", overrides={"mesh": {"dp": 8}, "train": {"micro_batch": 4}})
    document = {"zero_optimization": {"stage": 2}}
    said = predicted(config, document, device="NVIDIA H100 80GB HBM3", gpus=8)
    assert said is not None and said["low"] < said["seconds"] < said["high"] and "H100" in said["constants"]
    assert predicted(config, document, device="AMD EPYC", gpus=0) is None
    without = {**_result([2.0]), "predicted": None}
    with_it = {**_result([2 * said["seconds"]]), "predicted": said}
    report.write([without, with_it], tmp_path)
    first, second = csv.DictReader((tmp_path / "results.csv").open())
    assert first["predicted_step_s"] == "" and float(second["predicted_step_s"]) == said["seconds"]
    assert float(second["predicted_memory_gib"]) == said["memory_bytes"] / 2**30
    page = (tmp_path / "results.html").read_text()
    assert "Predicted against measured" in page and page.count("<circle") == 1 and "50 %" in page
    y, x = (float(re.findall(rf'{name}="([\d.]+)"', page)[0]) for name in ("cy", "cx"))
    assert 400 - y > x + 20  # twice as long as predicted: above the line
    ends = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)"', page)[0]
    assert x == pytest.approx(sum(map(float, ends)) / 2, abs=0.11)  # in the middle of its interval; digits of the page
    report.write([without], tmp_path)
    assert "Predicted against" not in (tmp_path / "results.html").read_text()


def test_a_difference_within_the_spread_of_the_steps_is_called_so() -> None:
    def change(after: list[float]) -> str:
        return next(iter(report.compare([_result([3.0, 3.0, 3.3])], [_result(after)]).columns[3].cells))  # type: ignore[list-item]

    assert "within the spread" in change([3.1, 3.1, 3.1])
    assert change([1.5, 1.5, 1.5]) == "+100.0%"


def test_results_of_different_runs_are_not_compared() -> None:
    with pytest.raises(UserError, match="no layout in common"):
        report.compare([_result([3.0])], [_result([3.0], train={"micro_batch": 8})])


def test_a_sweep_is_a_grid_and_a_list(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "run: gpt-tiny\nflags: {model.vocab: 64}\ngrid: {mesh.dp: [1, 2], mesh.pp: [1, 2]}\nlayouts: [{mesh.tp: 4}]\ntimeout: 9\n"
    )
    run, cases, timeout = benching.read_sweep(path)
    assert (run, timeout) == ("gpt-tiny", 9.0)
    assert cases[0] == {"model.vocab": 64, "mesh.tp": 4}
    assert [(case["mesh.dp"], case["mesh.pp"]) for case in cases[1:]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    path.write_text("run: gpt-tiny\ngird: {}\nlayouts: []\n")
    with pytest.raises(UserError, match="gird is no key of a sweep; did you mean grid"):
        benching.read_sweep(path)


def test_a_run_that_is_refused_and_one_that_hangs_are_rows(tmp_path: Path) -> None:
    arguments = ["gpt-tiny", "--model.vocab", "64", "--mesh.tp", "3", "--steps", "2", "--warm-up", "0"]
    refused = cases.run_case(arguments, tmp_path / "a", timeout=120)
    assert refused["status"] == "refused" and "not divisible by mesh.tp = 3" in refused["reason"]
    late = cases.run_case(arguments, tmp_path / "b", timeout=0.01)
    assert (late["status"], late["layout"]) == ("timeout", "model.vocab=64 mesh.tp=3")


def test_a_line_through_the_times_of_a_link_is_found() -> None:
    seconds = {size: 2e-5 + size / 5e9 for size in (1 << 14, 1 << 18, 1 << 22, 1 << 26)}
    alpha, beta = network.line(seconds)
    assert (alpha, beta) == (pytest.approx(2e-5), pytest.approx(5e9))
    alpha, beta = network.line({size: size / 1e9 for size in seconds})
    assert alpha < 1e-9 and beta == pytest.approx(1e9)


def test_a_layout_is_said_in_few_words() -> None:
    config = settings.load("gpt-1.3b", overrides={"mesh": {"dp": 2, "pp": 2, "tp": 2}, "train": {"recompute": "full"}})
    assert layout(config) == "dp2 pp2 tp2 zero2 micro4 1f1b full bf16"


def test_kernels_are_not_measured_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is measured: there is no GPU; run this where there is an NVIDIA GPU"):
        benching.bench(benching.Benching(what=("kernels",), output=str(tmp_path / "out")), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "said", "status", "reason"),
    [
        (
            143,
            "megalite: mesh dp = 3 does not fit\nsrun: error: node1: task 1: Exited with exit code 2\n",
            "refused",
            "mesh dp = 3 does not fit",
        ),
        (
            1,
            "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nsrun: error: node2: task 3\n",
            "oom",
            "torch.OutOfMemoryError: CUDA",
        ),
        (137, "slurmstepd: error: Detected 1 oom_kill event in StepId=3.0.\n", "oom", "slurmstepd: error: Detected"),
        (1, "Traceback\nRuntimeError: no\nmore\n", "crash", "RuntimeError: no"),
        (9, "", "crash", "exit code 9"),
    ],
)
def test_why_a_layout_was_not_measured_is_said_by_its_ranks_first(code: int, said: str, status: str, reason: str, tmp_path: Path) -> None:
    def start(words: list[str], log: Path, timeout: float) -> int:
        log.write_text(said)
        return code

    found = cases.run_case(["gpt-tiny", "--mesh.dp", "3", "--steps", "2"], tmp_path, timeout=9, start=start)
    assert found["status"] == status and found["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce-scatter"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send, receive and waiting for other stages"),
        ("gloo:all_to_all", "all-to-all"),
        ("gloo:reduce_scatter", "reduce-scatter"),
        ("ncclDevKernel_Broadcast_RING_LL", None),
    ],
)
def test_time_on_links_is_told_apart_by_what_the_libraries_call_it(name: str, kind: str | None) -> None:
    assert _link(name) == kind
