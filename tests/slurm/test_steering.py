"""Sweeps, chains, files that steer a run, the check of nodes, the status, and what is refused before anything is queued."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from local import PATIENCE, Cluster
from runs import losses

pytestmark = pytest.mark.timeout(2 * PATIENCE)
SLURM = Path(__file__).parents[2] / "slurm"
OLD_TORCH = """
import os, sys
import megalite.cluster.health as health
plain = health.versions
health.versions = lambda: {**plain(), **({"torch": "1.0"} if os.environ["SLURMD_NODENAME"] == "node2" else {})}
sys.exit(health.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.takes(145)
def test_an_array_of_four_rows_gives_a_table_in_which_one_has_failed(cluster: Cluster) -> None:
    rows = [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-2}, {"checkpoint.resume": "no/such/checkpoint"}, {"mesh.dp": 3}]
    (cluster.folder / "rates.yaml").write_text(
        yaml.safe_dump({"run": "small.yaml", "rows": rows, "flags": {"train.steps": 3}, "at_once": 2})
    )
    said = cluster.megalite("submit", "--sweep", "rates.yaml", "--slurm.profile", cluster.profile(ranks_per_node=2))
    assert "row 3 is left out: nodes x ranks = 1 x 2 = 2: mesh dp*pp*tp = 3*1*1 = 3" in said
    number = re.search(r"job (\d+)", said)
    assert number
    cluster.wait(lambda: not cluster.call("squeue", "--noheader", f"--jobs={number[1]}").strip(), "the array")
    table = cluster.megalite("jobs", "runs/rates").splitlines()
    found = [line.split()[2:5] for line in table[1:]]
    assert [line[0] for line in found] == ["done", "done", "failed", "refused"], table
    assert "no/such/checkpoint" in table[3]
    assert found[0][1] == "3" and found[0][2] != found[1][2], "another rate, another loss"
    assert (cluster.folder / "runs/rates/results.txt").read_text().splitlines() == table


@pytest.mark.long
@pytest.mark.takes(90)
def test_layouts_are_measured_as_jobs_of_their_own_and_one_that_cannot_run_is_a_row(cluster: Cluster) -> None:
    flags = {"model.vocab": 64, "mesh.pp": 1, "mesh.tp": 1, "train.global_batch": 4, "train.micro_batch": 1, "deepspeed": "zero2"}
    (cluster.folder / "layouts.yaml").write_text(
        yaml.safe_dump({"run": "gpt-tiny", "flags": flags, "grid": {"mesh.dp": [4, 3]}, "timeout": PATIENCE})
    )
    words = ["--steps", "2", "--warm-up", "1", "--slurm", cluster.profile(ranks_per_node=2), "--nodes", "2", "--output", "measured"]
    said = cluster.megalite("bench", "--sweep", "layouts.yaml", *words)
    good, bad = json.loads((cluster.folder / "measured/results.json").read_text())
    assert good["ranks"] == 4 and good["seconds"]["min"] > 0
    assert bad["status"] == "refused" and "dp*pp*tp = 3*1*1 = 3, but 4 ranks" in bad["reason"], said


@pytest.mark.long
@pytest.mark.takes(150)
def test_a_chain_prepares_trains_on_what_was_prepared_judges_and_exports_it(cluster: Cluster) -> None:
    text = cluster.folder / "text.txt"
    text.write_text("\n\n".join(f"The {number}th document tells of numbers like {number * 7}." for number in range(2000)))
    (cluster.folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{n} times 7 is {n * 7}."}) + "\n" for n in range(200)))
    train = {"vocab": None, "layers": 1, "width": 32, "heads": 2, "sequence": 16}
    run = yaml.safe_load((cluster.folder / "small.yaml").read_text()) | {
        "name": "linked",
        "model": train,
        "data": {"train": ["data/numbers"]},
    }
    (cluster.folder / "linked.yaml").write_text(yaml.safe_dump(run))
    links = [
        {"prepare": "text.txt --output data/numbers --tokenizer train:bpe --vocab-size 300"},
        {"train": "linked.yaml --train.steps 2 --nodes 2"},
        {"finetune": "--task lm --from runs/linked --train rows.jsonl --output runs/tuned --train.steps 2 --deepspeed zero3"},
        {"evaluate": "runs/tuned --data rows.jsonl --output judged"},
        {"export": "runs/linked/checkpoints/latest --output numbers-hf"},
    ]
    (cluster.folder / "chain.yaml").write_text(yaml.safe_dump(links))
    said = cluster.megalite("submit", "--chain", "chain.yaml", "--nodes", "2", "--slurm.profile", cluster.profile(ranks_per_node=1))
    numbers = re.findall(r"^job (\d+)", said, flags=re.MULTILINE)
    assert len(numbers) == 5
    for number in numbers:
        cluster.finish(number)
    assert (cluster.folder / "numbers-hf/config.json").is_file()
    assert json.loads((cluster.folder / "runs/tuned/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert json.loads((cluster.folder / "judged.json").read_text())["mesh"]["dp"] == 2  # a rank on each of the two nodes
    assert json.loads((cluster.folder / "runs/linked/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.takes(60)
def test_files_save_raise_the_log_level_and_stop_a_run_that_passed_the_check_of_its_nodes(cluster: Cluster) -> None:
    job = cluster.submit(
        "small.yaml", "--nodes", "2", "--name", "steered", "--checkpoint.every", "0", "--train.steps", "500", seconds=0.5, health=True
    )
    run = cluster.folder / "runs/steered"
    cluster.reach("steered", 1)
    for node in ("node1", "node2"):
        told = json.loads(next(run.glob(f"slurm/{job}-0-1/health-{node}.json")).read_text())
        assert told["faults"] == [] and told["seconds"] < PATIENCE
    said = cluster.megalite("jobs", "runs/steered")
    assert re.search(rf"runs/steered +{job} +running +\d+/500 .* on node\[1-2\], .* to its time limit", said), said
    assert "already; scancel" in cluster.refusal("submit", "small.yaml", "--name", "steered", "--slurm.gpus-per-node", "0")
    (run / "control/log-level").write_text("DEBUG")
    (run / "control/save").touch()
    cluster.wait(lambda: list(run.glob("checkpoints/step-*/manifest.json")), "a checkpoint")
    assert cluster.state(job) == "RUNNING"
    (run / "control/stop").touch()
    cluster.finish(job, state="FAILED")
    (line,) = cluster.attempts("steered")
    assert (line["verdict"], line["reason"]) == ("stopped", "saved: control/stop")
    assert len(list(run.glob("checkpoints/step-*/manifest.json"))) == 2
    assert re.search(r"\[rank 1\] step \d", (run / "logs/rank-1.log").read_text()), "each rank says what it is about to do"
    assert re.search(rf"runs/steered +{job} +stopped", cluster.megalite("jobs", "runs/steered"))


@pytest.mark.long
@pytest.mark.takes(140)
def test_a_node_that_fails_its_check_is_named_excluded_and_the_job_goes_on_without_it(cluster: Cluster) -> None:
    """A node with another megalite: its check of the code differs. The batch script's own node is right by definition."""
    profile = yaml.safe_load(Path(cluster.profile(health=True, exclude="node[4-5]")).read_text())
    slow = profile["setup"][0].partition("=")[2]
    plant = cluster.folder / "plant.py"
    plant.write_text(OLD_TORCH)
    python = cluster.folder / "python-with-an-old-torch"
    python.write_text(f'#!/usr/bin/env bash\nif [[ "$2" == *.health ]]; then shift 2; exec {slow} {plant} "$@"; fi\nexec {slow} "$@"\n')
    python.chmod(0o755)
    path = cluster.folder / "old.yaml"
    path.write_text(yaml.safe_dump({**profile, "setup": [f"export MEGALITE_PYTHON={python}"]}))
    said = cluster.megalite("submit", "small.yaml", "--nodes", "2", "--name", "mixed", "--train.steps", "1", "--slurm.profile", str(path))
    job = said.split()[1]
    cluster.finish(job)
    first, last = cluster.attempts("mixed")
    assert first["verdict"] == "again" and "node2: torch is 1.0, elsewhere" in first["reason"]
    assert last["verdict"] == "finished" and last["nodes"] == ["node1", "node3"]


# ---- refused before anything is queued -------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line_and_nothing_is_queued(cluster: Cluster) -> None:
    on = ("submit", "small.yaml", "--name", "refused", "--slurm.gpus-per-node", "0")
    assert "nodes x ranks = 2 x 2 = 4: mesh" in cluster.refusal(*on, "--nodes", "2", "--slurm.ranks-per-node", "2", "--mesh.tp", "3")
    assert "slurm.time = 2 is 120 s" in cluster.refusal(*on, "--slurm.time", "2")
    assert "invalid partition specified: nowhere" in cluster.refusal(*on, "--slurm.partition", "nowhere")
    assert "sbatch refused the job" in cluster.refusal(*on[:-1], "5", "--slurm.ranks-per-node", "1")
    assert not (cluster.folder / "runs/refused").exists(), "and nothing is left behind"


def test_a_run_folder_that_nodes_do_not_see_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Each node has a /dev/shm of its own."""
    folder = Path("/dev") / "shm" / tmp_path.name
    try:
        said = cluster.refusal("submit", "small.yaml", "--run.folder", str(folder), "--slurm.gpus-per-node", "0")
        assert f"run.folder = {folder} is not seen from the nodes" in said
        assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- by hand ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_every_script_passes_sbatch_and_shellcheck(cluster: Cluster, path: Path) -> None:
    cluster.call("sbatch", "--test-only", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=1000", str(path))
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.takes(50)
def test_the_script_runs_by_hand_as_it_is_and_print_shows_what_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    profile = cluster.profile(ranks_per_node=1)
    shown = cluster.megalite("submit", "small.yaml", "--nodes", "2", "--name", "shown", "--slurm.profile", profile, "--print")
    script = tmp_path / "shown.sbatch"
    script.write_text(shown)
    (cluster.folder / "runs/shown/slurm").mkdir(parents=True)
    by_hand = cluster.call("sbatch", "--parsable", str(script), "small.yaml", "--name", "shown", "--train.steps", "1").strip()
    (python,) = re.findall(r"export MEGALITE_PYTHON=(\S+)", shown)
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--mem=4000", "--output=%x-%j.out")
    given = f"--export=ALL,MEGALITE_HEALTH=0,MEGALITE_PYTHON={python}"
    plain = cluster.call(
        "sbatch", "--parsable", *options, given, str(SLURM / "pretrain.sbatch"), "small.yaml", "--name", "plain", "--train.steps", "1"
    ).strip()
    for run, job in (("shown", by_hand), ("plain", plain)):
        cluster.finish(job)
        assert [*losses(cluster.folder / "runs" / run)] == [1]
