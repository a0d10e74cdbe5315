"""What `megalite prepare` does per CPU-second, and the memory it takes, at two input sizes.

In: the .py files of the running Python and of what is installed beside it. Out: a table. Not collected by pytest; run it with
`python tests/bench_prepare.py [--megabytes 12,48] [--workers 2]`. Start-up (imports, starting a worker, loading the tokenizer)
is the time of preparing one short document, and is taken off.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

RUN = """
import sys
from megalite.data.prepare import Preparation, prepare
if __name__ == "__main__":
    prepare(Preparation(inputs=(sys.argv[1],), output=sys.argv[2], tokenizer=sys.argv[3], workers=int(sys.argv[4])))
"""


def blocks() -> Iterator[str]:
    """Source files cut at blank lines into documents of about 2 kB."""
    for root in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(root)).rglob("*.py")):
            text = ""
            for block in file.read_text("utf-8", errors="ignore").split("\n\n"):
                text += block + "\n\n"
                if len(text) >= 2000:
                    yield text
                    text = ""
            if text.strip():
                yield text


def measure(script: Path, *arguments: str) -> tuple[float, float, float, float]:
    """CPU-seconds and wall seconds of a run, peak MB of its largest process and of all together."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.DEVNULL)
    peaks = [0.0, 0.0]

    def watch() -> None:
        try:
            parent = psutil.Process(run.pid)
            while run.poll() is None:
                sizes = [p.memory_info().rss / 1e6 for p in (parent, *parent.children(recursive=True))]
                peaks[:] = max(peaks[0], *sizes), max(peaks[1], sum(sizes))
                time.sleep(0.05)
        except psutil.Error:
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    if run.wait():
        raise SystemExit("prepare failed")
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - began, *peaks


def main() -> None:
    from megalite.data.tokenizer import train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", default="12,48")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--tokenizer", default="train:bpe", help="train:bpe, train:wordpiece, train:unigram; 32000 entries")
    arguments = parser.parse_args()
    sizes = [int(size) * 10**6 for size in arguments.megabytes.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.py").write_text(RUN)
        files = {size: (folder / f"{size}.jsonl").open("w", encoding="utf-8") for size in [1000, *sizes]}
        sample: list[str] = []
        for text in blocks():
            if len(sample) < 8000:
                sample.append(text)
            for size, file in files.items():
                if file.tell() < size:
                    file.write(json.dumps({"text": text}) + "\n")
        for file in files.values():
            file.close()
        train_tokenizer(arguments.tokenizer, sample, vocab_size=32000).save(folder / "tokenizer")
        started = 0.0
        for size in files:
            cpu, wall, largest, together = measure(
                folder / "run.py", f"{folder}/{size}.jsonl", f"{folder}/out{size}", f"{folder}/tokenizer", arguments.workers
            )
            megabytes = (folder / f"{size}.jsonl").stat().st_size / 1e6
            if size == 1000:
                started = cpu
                print(f"start-up {cpu:.2f} CPU-s")
                continue
            print(
                f"{megabytes:7.1f} MB  {cpu:6.2f} CPU-s  {megabytes / (cpu - started):5.2f} MB/CPU-s without start-up "
                f"({megabytes / cpu:.2f} with)  {wall:6.1f} s  peak RSS {largest:.0f} MB largest process, {together:.0f} MB together"
            )


if __name__ == "__main__":
    main()
