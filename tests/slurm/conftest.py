"""One cluster for all tests of this folder, and the run that nothing befell."""

from __future__ import annotations

import fcntl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from local import WHY_NOT, Cluster
from runs import finish, make_shard, run_file, train


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its state lies in one place, for a machine has room for one cluster: so that of a test run that was killed is found, and stopped."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    folder, state = tmp_path_factory.mktemp("login"), Path(tempfile.gettempdir(), "megalite-slurm")
    with state.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until another test run is done with its own
        cluster = Cluster(state, folder)
        run_file(folder, make_shard(folder), mesh={})
        try:
            yield cluster
        finally:
            cluster.do("stop")


@pytest.fixture(scope="session")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without SLURM and faults: two forked ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(train(cluster.folder / "small.yaml", folder, "--mesh.dp", "2"))
    return folder
