"""Every entry of the tables compiled ahead of time for its GPU, without one: nothing spilled, no tensor-core instruction that waits for
another, tensor-core instructions in the main loop, shared memory within what there is.

What proven.json holds was found clean and is taken from there as long as nothing that its machine code depends on has changed; a few
entries of every GPU are compiled in any case, and all of them where slow tests run.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
from megalite_kernels.tables import BLOCKS, INTERPRETER, KERNELS, Tile, entries, read_tables

triton = pytest.importorskip("triton")
compiled = pytest.importorskip("megalite_kernels.compiled")
proven = pytest.importorskip("megalite_kernels.proven")

pytestmark = pytest.mark.timeout(900)  # the first test compiles

ARCHS = [arch for arch in read_tables() if arch != INTERPRETER]
ENTRIES = [(arch, entry) for arch in ARCHS for entry in entries(arch)]
ALWAYS = {("by_keys", 128, "features"), ("forward", 128, "spans"), ("by_rows", 64, "band")}


@functools.cache
def _faults() -> dict[object, list[str]]:
    """Of the entries that nothing is known of."""
    known = proven.clean()
    names = [(proven.name_of(*entry), entry) for entry in ENTRIES]
    unknown = [entry for name, entry in names if known.get(name) != proven.fingerprint(*entry) or entry[1][:3] in ALWAYS]
    return compiled.survey(unknown)


@pytest.mark.parametrize("entry", ENTRIES, ids=[proven.name_of(*entry) for entry in ENTRIES])
def test_an_entry_compiles_to_clean_machine_code(entry: tuple[str, object]) -> None:
    assert not _faults().get(entry, [])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_all_of_them_are_compiled_where_there_is_time(arch: str) -> None:
    found = compiled.survey([entry for entry in ENTRIES if entry[0] == arch])
    assert len(found) > 50 and not any(found.values())


def test_a_changed_kernel_tile_or_constant_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is compiled again: here the scramble of dropout's draws, two calls below the kernel."""
    from megalite_kernels import tiles  # pyright: ignore[reportMissingImports]

    kernel, block, kind, tile = entry = next(entry for entry in entries("sm90") if entry[:3] == ("forward", 128, "features"))
    before = proven.fingerprint("sm90", entry)
    assert before == proven.clean()[proven.name_of("sm90", entry)]
    changed = [proven.fingerprint("sm90", (kernel, block, kind, dataclasses.replace(tile, stages=tile.stages + 1)))]
    changed.append(proven.fingerprint("sm100", entry))
    monkeypatch.setattr(tiles, "SCRAMBLE_0", triton.language.constexpr(3))
    changed.append(proven.fingerprint("sm90", entry))
    assert before not in changed and len(set(changed)) == 3


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["measure", "differentiate", "drop", "draw"])
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
