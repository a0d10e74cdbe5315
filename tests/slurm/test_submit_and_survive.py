"""On a real cluster, runs give the numbers of one that nothing befell: time limits, preemption, crashes, cut networks, hung ranks."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from local import PATIENCE, Cluster
from runs import STEPS, finish, losses, same_bits, train

pytestmark = pytest.mark.timeout(2 * PATIENCE)


def _same_end(cluster: Cluster, run: str, whole: Path) -> None:
    folder = cluster.folder / "runs" / run
    assert losses(folder) == losses(whole)
    same_bits(folder / f"checkpoints/step-{STEPS}", whole / f"checkpoints/step-{STEPS}")


def _wait_for_all_nodes(cluster: Cluster) -> None:
    idle = ("sinfo", "--noheader", "--partition=gpu", "--states=idle", "--format=%D")
    cluster.wait(lambda: cluster.call(*idle).strip() == "5", "all nodes")


@pytest.mark.takes(90)
def test_two_nodes_of_two_ranks_give_the_losses_of_one_process_and_two_jobs_share_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    one = tmp_path / "one"
    on = ("--nodes", "2", "--mesh.tp", "2")
    first = cluster.submit("small.yaml", *on, "--name", "first", ranks=2, exclude="node[3-5]")
    second = cluster.submit("small.yaml", *on, "--name", "second", ranks=2, exclude="node[3-5]", launcher="torchrun")
    cluster.finish(first)
    cluster.finish(second)
    finish(train(cluster.folder / "small.yaml", one))
    for run, job in (("first", first), ("second", second)):
        found = losses(cluster.folder / "runs" / run)
        assert found.keys() == losses(one).keys()
        for step, numbers in losses(one).items():
            assert found[step] == pytest.approx(numbers, rel=1e-5)
        assert f"=== {cluster.folder}/runs/{run}/slurm/{run}-{job}.out" in cluster.told(job)
        assert {path.name for path in (cluster.folder / "runs" / run / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    told = cluster.told(first)
    assert re.search(r"4 ranks met at node1:\d+; gloo and NCCL's TCP use eth0 \(198\.18\.\d+\.11\), by which node2 is reached", told), told


@pytest.mark.takes(120)
def test_a_run_goes_on_after_the_time_limit_a_requeue_and_preemption(cluster: Cluster, whole: Path) -> None:
    cluster.allow("moved", 2)
    job = cluster.submit("small.yaml", "--nodes", "2", "--name", "moved", held="moved", partition="preempt", time="30", lead=60)
    cluster.reach("moved", 2)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what SLURM does slurm.lead seconds ahead of the time limit
    cluster.wait(lambda: "USR1: save" in cluster.told(job), "the signal")
    cluster.allow("moved", 3)
    cluster.wait(lambda: cluster.attempts("moved"), "the end of the first attempt")
    cluster.allow("moved", 4)
    cluster.reach("moved", 4, start=2)
    before = cluster.restarts(job)
    cluster.call("scontrol", "requeue", job)
    cluster.wait(lambda: cluster.restarts(job) > before, "the requeue")
    cluster.allow("moved", 5)  # the second start may take it still, while it ends
    cluster.wait(lambda: cluster.hurry() or f"{job}: start number 3" in cluster.told(job), "the third start")
    cluster.allow("moved", 6)
    cluster.reach("moved", 6, start=2)  # an attempt that SLURM killed is not always judged
    other = cluster.call("sbatch", "--parsable", "--nodes=5", "--exclusive", "--wrap", "sleep 2").strip()
    cluster.wait(lambda: "PreemptTime=2" in cluster.call("scontrol", "show", "job", job), "preemption")
    time.sleep(3)  # ranks hear of it a moment later
    cluster.allow("moved", STEPS)
    cluster.finish(other)
    cluster.finish(job)
    ends = {line["attempt"]: (line["verdict"], line["reason"]) for line in cluster.attempts("moved")}
    assert ends[f"{job}-0-1"] == ("requeue", "saved: SIGUSR1")
    assert ends[f"{job}-2-1"] == ("requeue", "saved: SIGTERM")
    assert ends[f"{job}-3-1"][0] == "finished", "each time in a job that was requeued once more"
    _same_end(cluster, "moved", whole)


@pytest.mark.takes(200)
def test_a_run_goes_on_after_a_killed_rank_a_hung_one_a_cut_network_and_a_crashed_node(cluster: Cluster, whole: Path) -> None:
    """Nodes 1 and 2 train, 3 and 4 are spares; the batch script runs on node 1."""
    cluster.allow("hurt", 2)
    words = ("small.yaml", "--nodes", "2", "--name", "hurt", "--watch.hang", "20")
    job = cluster.submit(*words, held="hurt", spares=2, exclude="node5")
    cluster.reach("hurt", 2)
    cluster.ranks("node2")[0].kill()
    cluster.allow("hurt", 3)
    cluster.reach("hurt", 3, start=2)
    cluster.ranks("node2")[0].suspend()
    cluster.allow("hurt", 4)
    cluster.reach("hurt", 4, start=3)
    cluster.do("cut", "node2")
    cluster.allow("hurt", 5)
    cluster.reach("hurt", 5, start=4)
    cluster.do("crash", "node3")
    cluster.allow("hurt", STEPS)
    try:
        cluster.finish(job)
        killed, hung, cut, crashed, done = cluster.attempts("hurt")
        assert killed["nodes"] == hung["nodes"] == cut["nodes"] == ["node1", "node2"]
        assert crashed["nodes"] == ["node1", "node3"] and done["nodes"] == ["node1", "node4"]
        assert (killed["rank"], killed["node"]) == (1, "node2") and "Killed" in killed["reason"]
        assert (hung["rank"], hung["node"]) == (1, "node2") and "no sign of life of rank 1 for 20 s" in hung["reason"]
        assert cut["node"] == "node2" and crashed["node"] == "node3"
        _same_end(cluster, "hurt", whole)
        assert "left out: node2: " in cluster.megalite("jobs", "runs/hurt")
    finally:
        cluster.do("heal", "node2")
        cluster.do("boot", "node3")
        _wait_for_all_nodes(cluster)


@pytest.mark.long
@pytest.mark.takes(65)
def test_a_run_goes_on_after_the_node_of_its_batch_script_crashed(cluster: Cluster, whole: Path) -> None:
    """With a spare the job outlives a node, so SLURM would not requeue it: a step on another node does."""
    cluster.allow("headless", 2)
    job = cluster.submit("small.yaml", "--nodes", "2", "--name", "headless", held="headless", spares=1, exclude="node[4-5]")
    cluster.reach("headless", 2)
    cluster.do("crash", "node1")
    cluster.wait(lambda: cluster.restarts(job) == 1, "the requeue")
    cluster.do("boot", "node1")
    cluster.allow("headless", STEPS)
    cluster.finish(job)
    (end,) = cluster.attempts("headless")
    assert (end["attempt"], end["verdict"]) == (f"{job}-1-1", "finished")
    _same_end(cluster, "headless", whole)


@pytest.mark.long
@pytest.mark.takes(50)
def test_without_a_spare_a_run_goes_on_with_fewer_nodes(cluster: Cluster, whole: Path) -> None:
    """Where the site says that one node will do: on another mesh, so the numbers agree, and the bits do not."""
    cluster.allow("fewer", 2)
    _wait_for_all_nodes(cluster)  # else one node will do for SLURM from the start
    job = cluster.submit("small.yaml", "--nodes", "2", "--name", "fewer", held="fewer", min_nodes=1, exclude="node[3-5]")
    cluster.reach("fewer", 2)
    cluster.do("crash", "node2")
    cluster.allow("fewer", STEPS)
    try:
        cluster.finish(job)
        crashed, done = cluster.attempts("fewer")
        assert crashed["nodes"] == ["node1", "node2"] and crashed["node"] == "node2"
        assert done["nodes"] == ["node1"] and done["verdict"] == "finished"
        found = losses(cluster.folder / "runs/fewer")
        assert found.keys() == losses(whole).keys()
        for step, numbers in losses(whole).items():
            assert found[step] == pytest.approx(numbers, rel=1e-5)
    finally:
        cluster.do("boot", "node2")
        _wait_for_all_nodes(cluster)
