"""Every entry of the tables compiled ahead of time for its GPU, without one: nothing spilled, no tensor-core instruction that waits for
another, tensor-core instructions in the main loop, shared memory within what there is. Triton keeps what it compiled, so the second run
is faster.
"""

from __future__ import annotations

import functools

import pytest
from megalite_kernels.tables import BLOCKS, INTERPRETER, KERNELS, Tile, entries, read_tables

compiled = pytest.importorskip("megalite_kernels.compiled")

pytestmark = pytest.mark.timeout(900)  # the first test of a GPU compiles all of its entries

ARCHS = [arch for arch in read_tables() if arch != INTERPRETER]
ENTRIES = [(arch, entry) for arch in ARCHS for entry in entries(arch)]


@functools.cache
def _faults(arch: str) -> dict[object, list[str]]:
    return compiled.survey([entry for entry in ENTRIES if entry[0] == arch])


def _name(entry: tuple[str, tuple[str, int, str, Tile]]) -> str:
    arch, (kernel, block, kind, _tile) = entry
    return f"{arch}-{kernel}-{block}-{kind}"


@pytest.mark.parametrize(
    "entry", [pytest.param(entry, marks=() if entry[0] == "sm90" else (pytest.mark.slow,), id=_name(entry)) for entry in ENTRIES]
)
def test_an_entry_compiles_to_clean_machine_code(entry: tuple[str, object]) -> None:
    assert not _faults(entry[0])[entry]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["measure", "differentiate"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_over_rows_compile_to_clean_machine_code(kernel: str, arch: str, dtype: str) -> None:
    assert not compiled.inspect_rows(kernel, arch, dtype=dtype).faults(products=False)


def test_the_tables_are_whole() -> None:
    assert ARCHS == ["sm80", "sm90", "sm100", "gfx942"]
    for arch in read_tables():
        kinds = {(kernel, block): set() for kernel in KERNELS for block in BLOCKS}
        for kernel, block, kind, tile in entries(arch):
            kinds[kernel, block].add(kind)
            assert 128 % tile.rows == 0, "the rows' statistics are padded to 128"
        for (kernel, block), found in kinds.items():
            if kernel == "prepare":
                assert found == {"any"}
            elif kernel != "by_keys_fused" or found:  # where the fused form has no tile, the split one does its work
                assert found == {"band", "spans", "features", "padded"}, (arch, kernel, block)


@pytest.mark.parametrize(
    "entry, fault",
    [
        (("sm90", ("by_keys_fused", 128, "band", Tile(128, 128, 8, 2, True))), "spilled"),
        (("sm80", ("forward", 128, "band", Tile(128, 128, 8, 3))), "shared memory"),
        (("sm90", ("by_rows", 256, "band", Tile(64, 64, 8, 2, True))), "wait for each other"),
        (("gfx942", ("by_keys", 128, "band", Tile(128, 128, 4, 1))), "spilled"),
    ],
)
def test_a_tile_that_is_too_big_is_found(entry: tuple[str, tuple[str, int, str, Tile]], fault: str) -> None:
    assert any(fault in line for line in compiled.inspect_entry(*entry))


def test_dropout_costs_less_than_its_draws_one_by_one_would() -> None:
    """One Philox draw a weight was seen to make the loop eight times as long; ours stays under three."""
    tile = read_tables()["sm90"]["forward"]["64"]["band"]
    plain, dropped = (compiled.inspect("forward", "sm90", width=64, spans=False, tile=tile, dropout=on) for on in (False, True))
    assert plain.instructions < dropped.instructions < 3 * plain.instructions
