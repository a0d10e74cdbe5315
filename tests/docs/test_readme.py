"""The README's commands run, its tree is the tree, and its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

from megalite import config, fit
from megalite.cluster import submit
from megalite.cluster.settings import Submission, read_site
from megalite.flags import read_flags

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FRESH = {"prepare", "train", "tune", "docs/walk.py", "checkpoint"}


def _commands(mark: str) -> list[str]:
    blocks = re.findall(rf"^```{mark}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root of a clone to commands with relative paths."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("ds_configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.timeout(900)
def test_the_commands_run_and_print_the_same_losses(clone: Path) -> None:
    """In the README's order, in one folder; training is cut to 3 steps by flags behind the README's own.

    The first of the verbs in FRESH in an interpreter of its own, the others in a fork of this one, which is some seconds sooner.
    """
    commands = [shlex.split(line) for line in _commands("sh") if line.startswith(("megalite ", "python "))]
    assert len(commands) >= 4
    known: set[str] = set()
    for program, *words in commands:
        short = ["--train.steps", "3", "--log.every", "1"] if words[0] in ("train", "finetune") else []
        short += ["--validation.batches", "1"] if words[0] == "train" else []
        if words[1] == "bert-tiny":
            continue  # prepares its own corpus: minutes; its recipe is trained by test_recipes and by `make pretrain-bert`
        if words[0] == "verify":
            continue  # tests/ranks/test_verify.py runs it, and reads what it prints
        if words[0] not in FRESH or words[0] in known:
            process = Forked([*words, *short], cwd=clone)
        else:
            way = [sys.executable, *(("-m", "megalite") if program == "megalite" else ()), *words, *short]
            process = subprocess.Popen(way, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        known.add(words[0])
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err + out
    losses = {}
    for run in ("first", "other", "third"):
        lines = [json.loads(line) for line in (clone / f"runs/{run}/metrics.jsonl").read_text().splitlines()]
        losses[run] = [line["loss"] for line in lines if "loss" in line]
        assert len(losses[run]) == 3
    assert losses["other"] == pytest.approx(losses["first"], rel=1e-5)
    assert losses["third"] == pytest.approx(losses["first"], rel=1e-5)


@pytest.mark.parametrize("command", _commands("sh gpu"))
def test_the_gpu_commands_are_runs_that_fit_their_ranks(command: str) -> None:
    words = shlex.split(command)
    at = words.index("train")
    run = config.load(words[at + 1], overrides=read_flags(words[at + 2 :], config.Config))
    per_node = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 8
    assert fit.resolve_mesh(run, per_node).mesh.dp is not None


@pytest.mark.parametrize("command", _commands("sh cluster"))
def test_the_cluster_commands_are_jobs_that_fit_their_nodes(command: str) -> None:
    words = shlex.split(command)
    assert words[:2] == ["megalite", "submit"]
    flags = read_flags(words[3:], Submission)
    site = read_site(flags.pop("slurm"))
    submit.check_mesh(
        config.load(words[2], overrides={key: value for key, value in flags.items() if key != "nodes"}), site, nodes=int(flags["nodes"])
    )
    submit.check_time(site)


@pytest.mark.parametrize("line", [line for line in _commands("sh") if line.startswith("make ")])
def test_the_make_targets_exist(line: str) -> None:
    done = subprocess.run(["make", "--dry-run", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tree_names_every_module_and_nothing_else() -> None:
    tree = README.split("## The tree")[1]
    named = set(re.findall(r"\b(\w+)\.py\b", tree))
    there = {path.stem for path in (ROOT / "megalite").rglob("*.py") if not path.stem.startswith("__")}
    assert named == there, f"only in the README: {sorted(named - there)}; only in the tree: {sorted(there - named)}"
