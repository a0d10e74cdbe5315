"""Ranks that torchrun or srun started know where they stand and where they meet; two jobs never meet each other."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest

from megalite.crew import RankError
from megalite.errors import UserError
from megalite.meeting import meet
from megalite.place import TRIES, Place, expand_hosts, find_interface, find_place

SRUN = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
FORK = multiprocessing.get_context("fork")


def _place(environment: dict[str, str]) -> Place:
    place = find_place(environment)
    assert place
    return place


def test_torchruns_ranks_are_joined_at_the_port_it_says() -> None:
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu01", "MASTER_PORT": "29400"}
    place = _place(given | SRUN)
    assert (place.rank, place.world, place.local_rank, place.address, place.ports) == (3, 4, 1, "gpu01", [29400])


def test_sruns_ranks_are_joined_and_agree_on_address_and_ports() -> None:
    place = _place(SRUN | {"SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1"})
    other = _place(SRUN | {"SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1", "SLURM_PROCID": "0"})
    assert (place.rank, place.world, place.local_rank, place.address) == (5, 8, 1, "gpu07")
    assert (place.ports, place.token) == (other.ports, other.token)
    assert len(set(place.ports)) == TRIES


def test_neighbouring_jobs_and_steps_look_first_at_different_ports_and_have_different_tokens() -> None:
    places = [_place(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in range(4711, 4811) for step in range(3)]
    firsts = [place.ports[0] for place in places]
    assert len(set(firsts)) > 0.9 * len(firsts)
    assert len({place.token for place in places}) == len(places)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", "n1"),
        ("a,b[1-2]", "a b1 b2"),
        ("n[001-003,200]-ib", "n001-ib n002-ib n003-ib n200-ib"),
        ("r[1-2]n[3-4],x", "r1n3 r1n4 r2n3 r2n4 x"),
        ("a-1,b", "a-1 b"),
        ("gpu[8-11]", "gpu8 gpu9 gpu10 gpu11"),
        ("fd00::1,fd00::2", "fd00::1 fd00::2"),
        ("", ""),
    ],
)
def test_host_lists_are_read_as_scontrol_reads_them(nodelist: str, hosts: str) -> None:
    assert expand_hosts(nodelist) == hosts.split()


def test_the_interface_that_leads_to_a_peer_is_found_and_a_peer_that_nobody_knows_is_no_error() -> None:
    assert find_interface("127.0.0.1") == ("lo", "127.0.0.1")
    assert find_interface("no.such.host.invalid") is None


# ---- meeting ---------------------------------------------------------------------------------------------------------------------------


def _meet(place: Place, said: Any) -> None:
    try:
        store, port = meet(place, patience=20)
        if place.rank == 0:
            store.set("word", place.attempt)
        said.put((place.attempt, place.rank, store.get("word").decode(), port))
        store.set(f"bye/{place.rank}", "yes")
        if place.rank == 0:  # it holds the store until the other has left
            store.wait(["bye/1"])
    except Exception as error:
        said.put((place.attempt, place.rank, repr(error), 0))


def _jobs_meet(*attempts: str, address: str = "127.0.0.1") -> list[tuple[str, int, str, int]]:
    """Two ranks of each job, all of them wanting the same ports."""
    said: Any = FORK.Queue()
    places = [Place(rank, 2, rank, address, job=99_000, attempt=attempt) for rank in (1, 0) for attempt in attempts]
    processes = [FORK.Process(target=_meet, args=(place, said)) for place in places]
    for process in processes:
        process.start()
    found = [said.get(timeout=30) for _ in places]
    for process in processes:
        process.join(10)
    return sorted(found)


def test_two_jobs_that_want_the_same_port_on_the_same_node_each_meet_their_own() -> None:
    found = _jobs_meet("one", "other")
    assert [(attempt, rank, word) for attempt, rank, word, _ in found] == [
        ("one", 0, "one"),
        ("one", 1, "one"),
        ("other", 0, "other"),
        ("other", 1, "other"),
    ]
    assert len({port for *_, port in found}) == 2


def test_a_port_that_something_else_listens_at_is_passed_over() -> None:
    taken = Place(0, 2, 0, "127.0.0.1", job=99_000).ports[0]
    with socket.create_server(("", taken), family=socket.AF_INET6, dualstack_ipv6=True):
        found = _jobs_meet("one")
    assert [word for _, _, word, _ in found] == ["one", "one"]


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine knows no IPv6")
def test_ranks_meet_by_ipv6() -> None:
    assert [word for _, _, word, _ in _jobs_meet("one", address="::1")] == ["one", "one"]


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 1 did not come to the meeting point on 127.0.0.1 within 1 s; missing: 1, 2 of 3 ranks"):
        meet(Place(0, 3, 0, "127.0.0.1", job=99_001), patience=1)
    with pytest.raises(RankError, match=r"rank 1 met nobody at 127.0.0.1, ports"):
        meet(Place(1, 3, 1, "127.0.0.1", job=99_002), patience=1)


def test_a_host_without_a_free_port_is_refused_with_the_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        place = Place(0, 2, 0, "127.0.0.1", port=server.getsockname()[1])
        with pytest.raises(UserError, match="are all taken; set MASTER_PORT to a free one"):
            meet(place, patience=1)
