"""Which entries of the tables were found clean, by a fingerprint of all that their machine code depends on.

Compiling all of them takes minutes, so the result is kept in proven.json: the tests compile what has another fingerprint.
`python -m megalite_kernels.proven` compiles every entry of every table with the Triton that is here, and keeps the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import triton

from .compiled import FUNCTIONS, Entry, asked_of, source_of, survey
from .tables import INTERPRETER, entries, read_tables

RECORD = Path(__file__).with_name("proven.json")


def name_of(arch: str, entry: Entry) -> str:
    """What proven.json calls it."""
    kernel, block, kind, _tile = entry
    return f"{arch}-{kernel}-{block}-{kind}"


def fingerprint(arch: str, entry: Entry) -> str:
    """Of what an entry's machine code depends on: the kernel's source and all it calls, how it is specialised, the target, the compiler."""
    source, tile = source_of(entry[0], **asked_of(entry)), entry[3]
    code = sorted(_text(function) for function in _called(FUNCTIONS[entry[0]]))
    told = (
        arch,
        triton.__version__,
        sorted(source.signature.items()),
        sorted(map(repr, source.constants.items())),
        sorted(source.attrs),
        tile,
    )
    return hashlib.sha256(repr((told, code)).encode()).hexdigest()[:16]


def _called(function: Any, known: set[Any] | None = None) -> set[Any]:
    """A kernel and every Triton function that it calls."""
    found = known if known is not None else set()
    if function not in found:
        found.add(function)
        for name in set(re.findall(r"\b\w+\b", function.src)):
            other = function.fn.__globals__.get(name)
            if isinstance(other, triton.runtime.JITFunction):
                _called(other, found)
    return found


def _text(function: Any) -> str:
    """Its source, and the constants of its module that it names."""
    names = set(re.findall(r"\b[A-Z][A-Z_0-9]*\b", function.src))
    known = {name: repr(function.fn.__globals__[name]) for name in sorted(names) if name in function.fn.__globals__}
    return f"{function.src}\n{known}"


def clean() -> dict[str, str]:
    """Fingerprints of what was compiled and found without a fault, by name."""
    return json.loads(RECORD.read_text())


def main() -> int:
    """Compile every entry of every table; keep what is clean, and say what is not."""
    found = survey([(arch, entry) for arch in read_tables() if arch != INTERPRETER for entry in entries(arch)])
    known = {name_of(*which): fingerprint(*which) for which, faults in found.items() if not faults}
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    for which, faults in found.items():
        for fault in faults:
            sys.stdout.write(f"{name_of(*which)}: {fault}\n")
    sys.stdout.write(f"{len(known)} of {len(found)} entries are clean by Triton {triton.__version__}\n")
    return int(len(known) < len(found))


if __name__ == "__main__":
    sys.exit(main())
