"""The grid is plain arithmetic: every rank has one place, every set of axes divides the world into groups that cover it once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.mesh import AXES, Mesh, _ends

DEGREES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
AXIS_SETS = [axes for size in range(len(AXES) + 1) for axes in itertools.combinations(AXES, size)]


def _place(mesh: Mesh) -> dict[str, int]:
    return {"dp": mesh.dp_rank, "pp": mesh.pp_rank, "cp": mesh.cp_rank, "tp": mesh.tp_rank}


def _mesh(degrees: tuple[int, ...], rank: int = 0) -> Mesh:
    return Mesh(**dict(zip(AXES, degrees, strict=True)), rank=rank)


@given(DEGREES)
def test_a_ranks_place_is_where_the_grid_has_it(degrees: tuple[int, ...]) -> None:
    grid = _mesh(degrees).grid()
    for rank in range(grid.numel()):
        mesh = _mesh(degrees, rank)
        assert grid[mesh.dp_rank, mesh.pp_rank, mesh.cp_rank, mesh.tp_rank] == rank
        assert mesh.world == grid.numel()


@given(DEGREES)
def test_every_set_of_axes_covers_the_world_once(degrees: tuple[int, ...]) -> None:
    for axes in AXIS_SETS:
        lines = _mesh(degrees).lines(*axes)
        assert sorted(rank for line in lines for rank in line) == list(range(_mesh(degrees).world)), axes


@given(DEGREES)
def test_the_ranks_of_a_line_differ_along_its_axes_and_nowhere_else(degrees: tuple[int, ...]) -> None:
    for axes in AXIS_SETS:
        for line in _mesh(degrees).lines(*axes):
            places = [_place(_mesh(degrees, rank)) for rank in line]
            for axis in AXES:
                assert axis in axes or len({place[axis] for place in places}) == 1, f"{axis} differs along {axes}"
            along = [tuple(place[axis] for axis in axes) for place in places]
            sizes = [range(getattr(_mesh(degrees), axis)) for axis in axes]
            assert along == list(itertools.product(*sizes)), "not all of the axis, or not in the order of ranks"


def test_tensor_parallel_neighbours_are_neighbours_and_replicas_lie_farthest_apart() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert mesh.lines("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.lines("pp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.lines("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.lines("pp", "tp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh.lines() == [[rank] for rank in range(8)]


def test_context_parallel_neighbours_lie_between_tensor_parallel_ones_and_stages() -> None:
    mesh = Mesh(dp=2, pp=2, cp=2, tp=2)
    assert mesh.lines("cp")[:2] == [[0, 2], [1, 3]]
    assert mesh.lines("dp", "cp")[:2] == [[0, 2, 8, 10], [1, 3, 9, 11]]
    assert mesh.num_copies == 4


@given(DEGREES)
def test_first_and_last_stage_are_the_ends_of_every_pipeline(degrees: tuple[int, ...]) -> None:
    meshes = [_mesh(degrees, rank) for rank in range(_mesh(degrees).world)]
    for line in _mesh(degrees).lines("pp"):
        assert [meshes[rank].first_stage for rank in line] == [True] + [False] * (len(line) - 1)
        assert [meshes[rank].last_stage for rank in line] == [False] * (len(line) - 1) + [True]


@pytest.mark.parametrize(("pp", "ends"), [(1, []), (2, [[0, 2], [1, 3]]), (3, [[0, 4], [1, 5]])])
def test_tied_weights_meet_at_the_two_ends_of_a_pipeline(pp: int, ends: list) -> None:
    assert _ends(Mesh(pp=pp, tp=2)) == ends


def test_one_process_is_a_mesh_of_one() -> None:
    mesh = Mesh()
    assert (mesh.world, _place(mesh), mesh.first_stage, mesh.last_stage) == (1, {"dp": 0, "pp": 0, "cp": 0, "tp": 0}, True, True)
    assert all(mesh.lines(*axes) == [[0]] for axes in AXIS_SETS)
