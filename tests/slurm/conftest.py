"""A cluster for the tests of a process, and the run that nothing befell."""

from __future__ import annotations

import fcntl
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from local import WHY_NOT, Cluster
from runs import finish, make_shard, run_file, train

PLACES = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, each with a quick one behind it: pytest-xdist deals every process two tests before it sees who is done."""
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    seconds = {item: mark.args[0] for item in here if (mark := item.get_closest_marker("takes"))}
    long = sorted(seconds, key=lambda item: -seconds[item])
    quick = [item for item in here if item not in seconds]
    ordered = iter([item for pair in zip_longest(long, quick) for item in pair if item])
    items[:] = [next(ordered) if item in here else item for item in items]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The first of this machine's places for a cluster that no other test process has; what one that was killed left there is stopped."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    folder = tmp_path_factory.mktemp("login")
    with ExitStack() as stack:
        place = next(place for place in range(PLACES) if stack.enter_context(_mine(place)))
        cluster = Cluster(_state(place), folder, subnet=f"198.18.{77 + place}")
        run_file(folder, make_shard(folder), mesh={})
        try:
            yield cluster
        finally:
            cluster.do("stop")


def _state(place: int) -> Path:
    return Path(tempfile.gettempdir(), f"megalite-slurm-{place}")


@contextmanager
def _mine(place: int) -> Iterator[bool]:
    with _state(place).with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@pytest.fixture(scope="session")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without SLURM and faults: two forked ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(train(cluster.folder / "small.yaml", folder, "--mesh.dp", "2"))
    return folder
