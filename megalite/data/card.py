"""The data card: where a corpus came from, what was done to it, and what is left, so that a run can be audited.

In: what a preparation was and did.  Out: OUTPUT.card.json for programs, OUTPUT.card.md for people, and with --report OUTPUT.removed.jsonl.
After Gebru et al. 2018, arXiv:1803.09010, as far as a program can know the answers. No text is repeated, and no secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from megalite.data.clean import Cleaning
from megalite.data.manifest import Manifest, write_atomically
from megalite.data.preparation import Preparation
from megalite.data.sweep import Record, files_of

SHOWN = 50  # sources listed on the page; the JSON has all


def write(
    p: Preparation,
    manifest: Manifest,
    files: Iterable[Path | str],
    *,
    cleaning: Cleaning | None,
    record: Record | None,
    events: Iterable[dict[str, Any]] | None,
) -> None:
    """Write the card, and the report where it was asked for; an older report goes."""
    where = files_of(p.output)
    facts = describe(p, manifest, files, cleaning=cleaning, record=record)
    where["report"].unlink(missing_ok=True)
    if p.report and events is not None:
        temporary = where["report"].with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        temporary.replace(where["report"])
    write_atomically(where["card"], json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n")
    write_atomically(where["page"], page(facts).encode())


def describe(
    p: Preparation, manifest: Manifest, files: Iterable[Path | str], *, cleaning: Cleaning | None, record: Record | None
) -> dict[str, Any]:
    """Everything the card says."""
    settings = p.model_dump(mode="json", exclude={"output", "workers"})
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "name": Path(p.output).name,
        "sources": [_source(file) for file in files],
        "settings": settings,
        "cleaning": cleaning.model_dump(mode="json", exclude_none=True) if cleaning else None,
        "steps": record.summary() if record else None,
        "examples": record.examples if record else None,
        "broken_lines": manifest.bad_lines,
        "splits": manifest.counts,
        "tokenizer": {"fingerprint": manifest.tokenizer, "vocabulary": manifest.vocab_size, "special": manifest.special},
        "versions": manifest.versions,
        "key": manifest.key,
    }


def _source(file: Path | str) -> dict[str, Any]:
    if isinstance(file, str):
        return {"name": file}
    status = file.stat()
    changed = datetime.fromtimestamp(status.st_mtime).astimezone().isoformat(timespec="seconds")
    return {"name": str(file), "bytes": status.st_size, "changed": changed}


def page(facts: dict[str, Any]) -> str:
    """The card as Markdown."""
    sources, tokenizer = facts["sources"], facts["tokenizer"]
    total = sum(source.get("bytes", 0) for source in sources)
    lines = [f"# Data card: {facts['name']}", "", f"Made {facts['made']} by megalite {facts['versions']['megalite']}.", ""]
    lines += [f"## Sources: {len(sources):,} files, {total / 1e6:,.1f} MB", ""]
    lines += _table(
        ("file", "bytes", "last changed"), [(s["name"], f"{s.get('bytes', 0):,}", s.get("changed", "")) for s in sources[:SHOWN]]
    )
    if len(sources) > SHOWN:
        lines += [f"and {len(sources) - SHOWN:,} more, in the JSON beside this page.", ""]
    lines += ["## Cleaning", ""]
    if facts["steps"] is None:
        lines += ["None: the text was taken as it is.", ""]
    else:
        rows = [
            (name, f"{step['documents']:,}", f"{step['characters']:,}", f"{step['changed']:,}", _counts(step["found"]))
            for name, step in facts["steps"].items()
        ]
        lines += _table(("after", "documents", "characters", "changed or removed", "found"), rows)
        lines += ["```json", json.dumps(facts["cleaning"], ensure_ascii=False, indent=2), "```", ""]
    if facts["broken_lines"]:
        lines += [f"{facts['broken_lines']:,} broken lines were left out.", ""]
    lines += ["## What is left", ""]
    counted = [(split, *(f"{n[what]:,}" for what in ("documents", "sequences", "tokens"))) for split, n in facts["splits"].items()]
    lines += _table(("split", "documents", "sequences", "tokens"), counted)
    lines += [f"Tokenizer `{tokenizer['fingerprint']}`, {tokenizer['vocabulary']:,} entries.", ""]
    lines += ["Settings:", "", "```json", json.dumps(facts["settings"], ensure_ascii=False, indent=2), "```", ""]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".", ""]
    return "\n".join(lines)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{what} {number:,}" for what, number in found.items())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in escaped), ""]
