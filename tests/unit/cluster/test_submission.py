"""Profiles and flags become a batch script that bash and shellcheck accept; what cannot run is refused before SLURM is asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite import cli
from megalite.cluster import chain, order, sweep
from megalite.cluster.script import render, train_options, train_variables
from megalite.cluster.settings import profiles, read_site, scripts, seconds
from megalite.cluster.submit import check_mesh, check_time
from megalite.config import load
from megalite.errors import UserError
from megalite.flags import read_flags


def _profile(folder: Path, **settings: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def _script(name: str = "pretrain", *, nodes: int = 2, **flags: Any) -> str:
    site = read_site(flags)
    options = train_options(site, name="run", nodes=nodes, output="/data/x y.out", comment="megalite run /data/x y")
    return render(name, site, options=options, variables=train_variables(site, nodes=nodes))


# ---- settings --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "length"),
    [("30", 1800), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("3-12:00:05", 302405)],
)
def test_times_are_read_as_slurm_reads_them(time: str, length: int) -> None:
    assert seconds(time) == length


@pytest.mark.parametrize("time", ["", "tomorrow", "1:2:3:4", "24h"])
def test_what_is_no_time_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="is no time; write 30"):
        read_site({"time": time})


def test_a_flag_wins_over_the_profile_and_the_profile_over_the_default(tmp_path: Path) -> None:
    site = read_site({"profile": _profile(tmp_path, partition="gpu", gpus_per_node=4, time="1:00:00"), "partition": "long"})
    assert (site.partition, site.gpus_per_node, site.time, site.lead) == ("long", 4, "1:00:00", 300)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"partion": "gpu"}, "profile {}: partion is no setting; did you mean partition?"),
        ({"lead": 0}, "profile {}: lead = '0': input should be greater than 0"),
        ({"setup": "module load cuda"}, "profile {}: setup = 'module load cuda'"),
        ({"profile": "other"}, "profile {} must be a mapping of settings, none of them `profile`"),
        (["partition"], "profile {} must be a mapping"),
    ],
)
def test_a_mistake_in_a_profile_is_named_with_the_file(tmp_path: Path, document: Any, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError) as refused:
        read_site({"profile": str(path)})
    assert said.format(path) in str(refused.value)


def test_a_profile_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        UserError, match=r"slurm.profile = ethernt is none of aws-efa, ethernet, infiniband, pyxis; did you mean ethernet\?"
    ):
        read_site({"profile": "ethernt"})
    with pytest.raises(UserError, match=r"gone.yaml does not exist"):
        read_site({"profile": "gone.yaml"})


# ---- the script ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", profiles())
def test_every_shipped_profile_makes_a_script_that_bash_and_shellcheck_accept(profile: str, tmp_path: Path) -> None:
    for name in ("pretrain", "sweep"):
        path = tmp_path / f"{name}.sbatch"
        path.write_text(_script(name, profile=profile, spares=1))
        assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
        if shutil.which("shellcheck"):
            found = subprocess.run(["shellcheck", "--severity=warning", "--exclude=SC1091", path], capture_output=True, text=True)
            assert found.returncode == 0, found.stdout


def test_the_script_asks_for_what_the_flags_say() -> None:
    text = _script(time="1:00:00", partition="gpu", account="me", gpus_per_node=4, spares=1, lead=120, cpus_per_rank=12)
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = ["--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00", "--partition=gpu", "--account=me", "--no-kill"]
    wanted += ["--signal=B:USR1@120", "--requeue", "--open-mode=append", "--exclusive", "--mem=0", "--cpus-per-task=12"]
    assert set(wanted) <= set(asked)
    assert "export MEGALITE_SPARES=1" in text and "export MEGALITE_NODES=2" in text


def test_fewer_nodes_will_do_where_the_site_says_so_and_nodes_may_be_shared() -> None:
    text = _script(nodes=4, min_nodes=2, exclusive=False, gres="gpu:a100:4", gpus_per_node=4)
    assert "#SBATCH --nodes=2-4" in text and "#SBATCH --gres=gpu:a100:4" in text
    assert "#SBATCH --mincpus=4" in text and "ntasks-per-node" not in text.partition("# ---- site")[0]
    assert "--exclusive" not in text and "--mem" not in text and "--gpus-per-node=" not in text


def test_words_with_spaces_and_quotes_reach_the_script_as_they_are(tmp_path: Path) -> None:
    profile = _profile(tmp_path, environment={"GREETING": "it's a $HOME", "NCCL_IB_TC": 106}, setup=["echo set up"])
    text = _script(profile=profile)
    path = tmp_path / "script"
    lines = text.splitlines()
    site = lines[lines.index("# ---- site: module loads, an environment, network variables") : lines.index("# ---- end of site")]
    path.write_text("\n".join([*site, 'echo "$GREETING $NCCL_IB_TC"']))
    assert subprocess.run(["bash", path], capture_output=True, text=True).stdout == "set up\nit's a $HOME 106\n"


def test_every_script_has_options_and_a_place_for_the_site() -> None:
    for path in scripts().glob("*.sbatch"):
        text = path.read_text()
        assert text.count("# ---- site") == text.count("# ---- end of site") == 1, path
        assert text.index("#SBATCH") < text.index("# ---- site")


# ---- refused ---------------------------------------------------------------------------------------------------------------------------


def test_a_mesh_that_does_not_fit_nodes_times_ranks_is_refused_with_both_numbers() -> None:
    run = load("gpt-7b", overrides={"mesh": {"tp": "3", "pp": "1"}})
    with pytest.raises(UserError, match=r"nodes x ranks = 2 x 8 = 16: mesh dp\*pp\*tp = 5\*1\*3 = 15, but 16 ranks"):
        check_mesh(run, read_site({}), nodes=2)


def test_fewer_nodes_are_refused_where_the_mesh_cannot_follow() -> None:
    with pytest.raises(UserError, match=r"slurm.min_nodes = 5 is more than nodes = 2"):
        check_mesh(load("gpt-7b"), read_site({"min_nodes": 5}), nodes=2)
    with pytest.raises(UserError, match=r"but mesh.dp = 4; leave it out"):
        check_mesh(load("gpt-7b", overrides={"mesh": {"dp": "4"}}), read_site({"min_nodes": 1}), nodes=2)


def test_a_time_limit_under_the_time_to_save_is_refused() -> None:
    with pytest.raises(UserError, match=r"slurm.time = 5 is 300 s, but the run is asked to save slurm.lead = 300 s ahead"):
        check_time(read_site({"time": "5"}))
    check_time(read_site({"time": "5", "lead": 60}))


def test_shards_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["submit", "gpt2-124m", "--data.train", "no/such/shard=0.5", "--print"])
    assert refused.value.code == 2 and "data.train = no/such/shard=0.5: there are no shards" in capsys.readouterr().err


def test_the_flags_of_a_run_come_back_as_the_words_of_its_command_line() -> None:
    words = ["--mesh.tp", "4", "--data.train", "a=0.5", "b", "--log.tensorboard", "false", "--run.folder", "x y"]
    assert order.flatten(read_flags(words, load("gpt-tiny").__class__)) == words


# ---- sweeps and chains -----------------------------------------------------------------------------------------------------------------


def _sweep(beside: Path, **document: Any) -> str:
    path = beside / "lr.yaml"
    path.write_text(yaml.safe_dump({"run": "gpt-7b", "flags": {"data.train": [str(beside / "shard")]}, **document}))
    (beside / "shard.train.idx").touch()
    return str(path)


def test_rows_and_a_grid_multiply_and_a_row_that_does_not_fit_is_left_out_with_the_reason(tmp_path: Path) -> None:
    path = _sweep(tmp_path, rows=[{"mesh.tp": 2}, {"mesh.tp": 3}], grid={"optimizer.lr": [1e-4, 2e-4]}, folder=str(tmp_path / "out"))
    wanted, site = sweep.read(path), read_site({})
    rows = sweep.plan(wanted, site, nodes=1, read_run=lambda words: load(words[0], overrides=read_flags(words[1:], type(load("gpt-7b")))))
    assert [row["flags"] for row in rows][:2] == [{"mesh.tp": 2, "optimizer.lr": 1e-4}, {"mesh.tp": 2, "optimizer.lr": 2e-4}]
    assert [bool(row["refused"]) for row in rows] == [False, False, True, True]
    assert "but 8 ranks were started" in rows[2]["refused"]
    assert "--array=0,1" in sweep.job(wanted, rows, site, nodes=1).text
    sweep.write(tmp_path / "out", rows)
    assert sweep.arguments(tmp_path / "out", 1)[-2:] == ["--name", "row-1"]
    table = sweep.table(tmp_path / "out").splitlines()
    assert table[1].split()[:4] == ["0", "mesh.tp=2", "optimizer.lr=0.0001", "waiting"]
    assert "refused" in table[3] and "8 ranks" in table[3]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "has neither rows nor a grid"),
        ({"row": []}, "row is no setting; did you mean rows?"),
        ({"rows": [{"mesh.tp": 3}]}, "none of 1 rows"),
    ],
)
def test_a_sweep_that_is_none_is_refused(tmp_path: Path, document: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        wanted = sweep.read(_sweep(tmp_path, **document))
        sweep.plan(wanted, read_site({}), nodes=1, read_run=lambda words: load(words[0], overrides={"mesh": {"tp": "3"}}))
    assert said in str(refused.value)


def test_a_chain_takes_verbs_that_have_a_script(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(
        "- prepare: stdlib --output data/x --tokenizer train:bpe\n- train: gpt-tiny --nodes 2\n- export: runs/x/checkpoints/latest\n"
    )
    assert [verb for verb, _ in chain.read(str(path))] == ["prepare", "train", "export"]
    path.write_text("- dance: now\n")
    with pytest.raises(UserError, match="dance cannot be a link; one of train, evaluate, export, finetune, prepare can"):
        chain.read(str(path))
    path.write_text("prepare: stdlib\n")
    with pytest.raises(UserError, match="must be a list of links"):
        chain.read(str(path))
