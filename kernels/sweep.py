"""`python -m megalite_kernels.sweep [--output FILE.json]`: remakes this GPU's part of tables.json by trying tiles.

Candidates are compiled on all cores and those with a fault (compiled.py) dropped before any is timed; the fastest of the rest goes into the
table, for every kernel, block and kind of mask. Backward kernels are timed by the whole backward pass with the other kernels as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .attention import why_not_triton
from .clock import measure
from .randomness import draw
from .spans import FAR, band, packed_spans
from .tables import BLOCKS, KERNELS, Tile, arch_of, read_tables

LENGTH = 4096
TABLES = Path(__file__).with_name("tables.json")


def candidates(arch: str, kind: str) -> list[Tile]:
    """Tiles worth compiling; descriptors only where the GPU has them and the block is whole."""
    descriptor = arch in ("sm90", "sm100") and kind not in ("padded", "any")
    sizes = itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    return [Tile(rows, keys, warps, stages, descriptor) for rows, keys, warps, stages in sizes if rows * keys >= 512]


def survivors(arch: str, kernel: str, block: int, kind: str) -> list[Tile]:
    """The candidates whose machine code is clean."""
    from .compiled import survey

    found = survey((arch, (kernel, block, kind, tile)) for tile in candidates(arch, kind))
    return [entry[3] for (_, entry), faults in found.items() if not faults]


def fastest(kernel: str, block: int, kind: str, tiles: list[Tile], device: torch.device) -> Tile | None:
    """By the median time of a causal pass over LENGTH tokens of 16 heads."""
    from .launch import Call, Operands, run_backward, run_forward

    width = block - block // 4 if kind == "padded" else block
    q, k, v, dout = (torch.randn(1, LENGTH, 16, width, device=device, dtype=torch.bfloat16) for _ in range(4))
    ends = torch.arange(0, LENGTH + 1, LENGTH // 4, device=device)
    spans = None if kind == "band" else packed_spans(ends, tokens=LENGTH, causal=True)
    low, high = band(LENGTH, LENGTH, causal=True) if spans is None else (-FAR, FAR)
    dropout = 0.1 if kind == "features" else 0.0
    x = Operands(q, k, v, spans, draws=draw(1, 16, LENGTH, LENGTH, device=device) if dropout else None)
    call = Call(low, high, width**-0.5, dropout_p=dropout, deterministic=kernel in ("by_keys", "by_rows"))
    out, lse = run_forward(x, call)

    def way(tile: Tile) -> Any:
        if kernel == "forward":
            return lambda: run_forward(x, call, chosen={kernel: tile})
        return lambda: run_backward(dout, None, out, lse, x, call, chosen={kernel: tile})

    times = measure({str(number): way(tile) for number, tile in enumerate(tiles)}, device=device, rounds=7)
    return tiles[int(min(times, key=lambda name: times[name]))] if times else None


def write(document: dict[str, Any], path: Path) -> None:
    """A line for every block of every kernel."""
    lines = []
    for arch, kernels in document.items():
        blocks = [
            f'  "{kernel}": {{\n' + ",\n".join(f'   "{block}": {json.dumps(kinds)}' for block, kinds in of.items()) + "\n  }"
            for kernel, of in kernels.items()
        ]
        lines.append(f' "{arch}": {{\n' + ",\n".join(blocks) + "\n }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megalite_kernels.sweep", description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLES, help="where the tables go; the packaged ones are replaced unless given")
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS[:-1]))
    parser.add_argument("--block", type=int, choices=BLOCKS, nargs="+", default=[64, 128])
    chosen = parser.parse_args(arguments)
    say = lambda text: sys.stdout.write(text + "\n")  # noqa: E731
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = "there is no GPU" if device.type == "cpu" else why_not_triton(torch.empty(0, device=device, dtype=torch.bfloat16))
    if reason:
        say(f"nothing is swept: {reason}; run this where there is an NVIDIA GPU of sm80 or newer, or a gfx942")
        return 2
    document, arch = json.loads(TABLES.read_text()), arch_of(device)
    for kernel, block in itertools.product(chosen.kernel, chosen.block):
        for kind in read_tables()[arch][kernel].get(str(block), {}):
            tiles = survivors(arch, kernel, block, kind)
            best = fastest(kernel, block, kind, tiles, device)
            if best is not None:
                document[arch][kernel][str(block)][kind] = [best.rows, best.keys, best.warps, best.stages, int(best.descriptor)]
            say(f"{arch} {kernel} {block} {kind}: {best} of {len(tiles)}")
            write(document, chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
