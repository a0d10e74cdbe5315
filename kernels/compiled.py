"""Machine code of any kernel for any GPU, without one: compile ahead of time, then read registers, spills and the main loop.

In: kernel, target, head width, kind of mask, tile. Out: a `Report`; its `faults` name what would make a kernel slow without making it
wrong. The test suite holds every entry of tables.json to that, and the sweep drops candidates that fail before it times any.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import backward, drop, forward, rows
from .tables import Tile, block_of

Entry = tuple[str, int, str, Tile]  # kernel, block, kind, tile

FUNCTIONS = {
    "forward": forward.attend,
    "by_keys_fused": backward.by_keys,
    "by_keys": backward.by_keys,
    "by_rows": backward.by_rows,
    "prepare": backward.prepare,
}
SHARED = {"sm80": 99, "sm90": 227, "sm100": 227, "gfx942": 64}  # KiB a program may have; sm80's table serves sm86, which has 99
TENSOR_CORES = {"sm80": r"\bHMMA", "sm90": r"\bHGMMA", "sm100": r"\bUTC\w*MMA|\bHMMA", "gfx942": r"\bv_mfma"}
DESCRIBED = {"Q": "rows", "K": "keys", "V": "keys", "DOUT": "rows"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel."""

    arch: str
    registers: int
    """a thread"""
    spilled: int
    """bytes (NVIDIA) or registers (AMD) that did not fit the registers"""
    shared: int
    """bytes of shared memory a program"""
    instructions: int
    """in the main loop: the innermost one with tensor-core instructions; 0: there is none"""
    tensor_core: int
    """tensor-core instructions in the main loop"""
    local: int
    """loads from and stores to spilled memory in the main loop"""
    serialized: tuple[str, ...]
    """why ptxas made asynchronous tensor-core instructions wait for each other (C7510, C7515)"""

    def faults(self, *, products: bool = True) -> list[str]:
        """One line each; products: the kernel multiplies matrices."""
        limit = SHARED[self.arch] * 1024
        found = []
        if self.spilled or self.local:
            found.append(f"{self.spilled} spilled, {self.local} spill instructions in the main loop; take a smaller tile or more warps")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory of {limit}; take a smaller tile or fewer stages")
        if products and not self.tensor_core:
            found.append("no tensor-core instruction in a loop")
        found += [f"tensor-core instructions wait for each other: {reason}" for reason in self.serialized]
        return found


def inspect(kernel: str, arch: str, *, width: int, spans: bool, tile: Tile, dtype: str = "bf16", **features: bool) -> Report:
    """Compile for "sm80", "sm90", "sm100" or "gfx942"; features: softcap, sinks, dropout. Takes seconds, or none from Triton's cache."""
    source = source_of(kernel, width=width, spans=spans, tile=tile, dtype=dtype, **features)
    return _compile(source, arch, {"num_warps": tile.warps, "num_stages": tile.stages})


def source_of(kernel: str, *, width: int, spans: bool, tile: Tile, dtype: str = "bf16", **features: bool) -> ASTSource:
    function = FUNCTIONS[kernel]
    constants = _constants(kernel, function.arg_names, width=width, spans=spans, tile=tile, features=features)
    signature = {
        name: "constexpr" if name in constants else _type(name, tile, dtype, block_of(width), kernel == "by_keys_fused")
        for name in function.arg_names
    }
    aligned = [n for n, t in signature.items() if t.startswith("*") or n.endswith(("_batch", "_row", "_head")) or n.startswith("number_")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)


def _compile(source: ASTSource, arch: str, options: dict[str, Any]) -> Report:
    if arch.startswith("sm"):
        options["enable_fp_fusion"] = True
        target = GPUTarget("cuda", int(arch[2:]), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    compiled = triton.compile(source, target=target, options=options)
    return _read_nvidia(compiled, arch) if arch.startswith("sm") else _read_amd(compiled, arch)


def inspect_entry(arch: str, entry: Entry) -> list[str]:
    """The faults of one entry of a table; a compiler that gives up is one too."""
    try:
        report = inspect(entry[0], arch, **asked_of(entry))
    except Exception as error:  # the compiler's errors have no class of their own
        return [f"does not compile: {str(error).strip()[-200:]}"]
    return report.faults(products=entry[0] != "prepare")


def asked_of(entry: Entry) -> dict[str, Any]:
    """What an entry stands for."""
    _kernel, block, kind, tile = entry
    width = block - block // 4 if kind == "padded" else block
    return {"width": width, "spans": kind in ("spans", "features", "padded"), "tile": tile, "dropout": kind == "features"}


def inspect_rows(kernel: str, arch: str, *, dtype: str = "bf16") -> Report:
    """The same for "measure" and "differentiate" of rows.py and "drop" and "draw" of drop.py, which have no table and multiply nothing."""
    home = drop if kernel in ("drop", "draw") else rows
    function, numbers = getattr(home, kernel), ("LABELS", "SAMPLES", "PLACES", "HEADS", "site")
    constants = {"COLUMNS": home.COLUMNS, "ADD": True, "x_column": 1, "residual_column": 1}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        number = "i64" if name in numbers else "fp32" if name in ("STATS", "DSTATS", "scale") else dtype if name.isupper() else "i32"
        return f"*{number}" if name.isupper() else number

    signature = {name: kind(name) for name in function.arg_names}
    attributes = {(number,): [["tt.divisibility", 16]] for number, kind in enumerate(signature.values()) if kind.startswith("*")}
    if kernel == "drop":  # strides of rows and samples, as widths are in life
        aligned = [
            number
            for number, name in enumerate(function.arg_names)
            if name in ("width", *(f"{x}_{y}" for x in ("x", "residual") for y in ("batch", "row")))
        ]
        attributes |= {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return _compile(source, arch, {"num_warps": home.WARPS})


def survey(entries: Iterable[tuple[str, Entry]]) -> dict[tuple[str, Entry], list[str]]:
    """(arch, entry) -> faults, on all cores this process may use."""
    todo = list(entries)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return dict(zip(todo, pool.map(inspect_entry, *zip(*todo, strict=True)), strict=True))


def _constants(kernel: str, names: list[str], *, width: int, spans: bool, tile: Tile, features: dict[str, bool]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "HEADS": 16, "GROUP": 2, "WIDTH": width, "BLOCK": block_of(width), "ROWS": tile.rows, "KEYS": tile.keys, "SPANS": spans,
        "DESCRIPTOR": tile.descriptor, "FUSED": kernel == "by_keys_fused", "DLSES": False, "SOFTCAP": False, "SINKS": False,
        "DROPOUT": False,
    }  # fmt: skip
    assert set(features) <= {"softcap", "sinks", "dropout"}, features
    values |= {name.upper(): on for name, on in features.items()}
    for pointer, needed in (("SINK", "SINKS"), ("NUMBERS", "DROPOUT"), ("DLSE", "DLSES")):
        if not values[needed]:
            values[pointer] = None
    if not spans:
        values |= dict.fromkeys(("LO", "HI", "FIRST", "LAST"))
    return {name: value for name, value in values.items() if name in names}


def _type(name: str, tile: Tile, dtype: str, block: int, fused: bool) -> str:
    if name == "DQ" and fused:
        dtype = "fp32"
    if tile.descriptor and (name in DESCRIBED or (name == "DQ" and fused)):
        return f"tensordesc<{dtype}[{getattr(tile, DESCRIBED.get(name, 'rows'))}, {block}]>"
    if name in ("LSE", "DLSE", "STATS", "SINK"):
        return "*fp32"
    if name in ("LO", "HI", "FIRST", "LAST", "NUMBERS"):
        return "*i32"
    if name.isupper():
        return f"*{dtype}"
    return "fp32" if name in ("inner", "factor", "slope", "keep_share") else "i32"


def _read_nvidia(compiled: Any, arch: str) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        listing = _output(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    loop = main_loop(listing, TENSOR_CORES[arch])
    return Report(
        arch=arch,
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        instructions=len(loop),
        tensor_core=sum(bool(re.search(TENSOR_CORES[arch], line)) for line in loop),
        local=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
        serialized=_waits(compiled.asm["ptx"], arch) if arch == "sm90" else (),
    )


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main_loop(listing: str, tensor_core: str) -> list[str]:
    """The instructions of the innermost loop with most tensor-core instructions; loops are backward branches."""
    places: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"^\s*(\.L_\w+):", line):
            places[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for end, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text)
        if branch and places.get(branch[1], end + 1) <= end:
            loops.append((places[branch[1]], end))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    bodies = [instructions[a : b + 1] for a, b in inner]
    count = {number: sum(bool(re.search(tensor_core, line)) for line in body) for number, body in enumerate(bodies)}
    best = max(count, key=lambda number: count[number], default=None)
    return bodies[best] if best is not None and count[best] else []


def _waits(ptx: str, arch: str) -> tuple[str, ...]:
    """ptxas says it only when asked, so it runs once more."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    number = int(arch[2:])
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(number).path, "-v", f"--gpu-name={sm_arch_from_capability(number)}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return tuple(re.findall(r"serialized due to (.{0,140}?)(?: in (?:the )?function| for the)", said))


def _read_amd(compiled: Any, arch: str) -> Report:
    text = compiled.asm["amdgcn"]
    number = lambda what: int(re.search(rf"\.{what}:\s+(\d+)", text)[1])  # type: ignore[index] # noqa: E731
    return Report(
        arch=arch,
        registers=number("vgpr_count"),
        spilled=number("vgpr_spill_count") + number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        instructions=len(text.splitlines()),
        tensor_core=len(re.findall(TENSOR_CORES[arch], text)),
        local=0,
        serialized=(),
    )
