"""MB per CPU-second of every cleaning step alone, on the standard library cut into documents of about 2 kB; not collected by pytest.

In: nothing. Out: a table. Run it with `python tests/bench_clean.py`.
"""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

from megalite.data.clean import Cleaning, steps_of
from megalite.data.duplicates import Duplicates, sketch

LENGTH, BYTES = 2000, 2_000_000


def documents() -> list[str]:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text("utf-8")
        found += [text[at : at + LENGTH] for at in range(0, len(text), LENGTH)]
    return found[: BYTES // LENGTH]


def main() -> None:
    texts = documents()
    size = sum(map(len, texts)) / 1e6
    every = Cleaning.model_validate(
        {"unicode": True, "lines": True, "languages": {"keep": ["en"]}, "quality": True, "repetition": True, "identity": True}
    )
    for name, (step, _) in steps_of(every).items():
        step(texts[0])
        began = time.process_time()
        for text in texts:
            step(text)
        print(f"{name:<12}{size / (time.process_time() - began):8.1f}")
    began = time.process_time()
    for at in range(0, len(texts), 500):
        sketch(texts[at : at + 500], Duplicates())
    print(f"{'duplicates':<12}{size / (time.process_time() - began):8.1f}   (sketches)")


if __name__ == "__main__":
    main()
