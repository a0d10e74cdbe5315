"""What `megalite prepare` does per CPU-second, and the memory it takes, at two input sizes.

In: the .py files of the running Python and of what is installed beside it, or `--corpus FILE.jsonl`. Out: a table. Not collected by
pytest; run it with `python tests/bench_prepare.py [--megabytes 12,48] [--workers 2]`. Start-up (imports, starting a worker, loading
the tokenizer) is the time of preparing one short document, and is taken off. `--tokenizer` makes one of 32,000 entries from the
corpus (train:bpe and so on), or takes a folder.

With `--against COMMAND`, another program does the same files in turn with ours: the command with {input}, {output} (a prefix),
{tokenizer} (a folder) and {workers} in it. No sentences are split then, and BERT's tokenizers end a document with [SEP]. Then medians
and ratio are printed, and whether both wrote the same .bin and .idx.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import resource
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil

OURS = f"{shlex.quote(sys.executable)} -m megalite prepare {{input}} --output {{output}} --tokenizer {{tokenizer}} --workers {{workers}}"


def documents(corpus: str | None) -> Iterator[str]:
    """Those of a jsonl file; else source files cut at blank lines into documents of about 2 kB."""
    if corpus:
        with Path(corpus).open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
        return
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


def measure(command: str) -> tuple[float, float, float, float]:
    """CPU-seconds and wall seconds of a run, peak MB of its largest process and of all together (shared pages divided by sharers)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryFile() as said:
        run = subprocess.Popen(shlex.split(command), stdout=said, stderr=said)
        peaks = [0.0, 0.0]

        def watch() -> None:
            while run.poll() is None:
                sizes = []
                with contextlib.suppress(psutil.Error):
                    for process in (psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)):
                        sizes.append(process.memory_full_info())
                if sizes:
                    peaks[:] = max(peaks[0], *(s.rss / 1e6 for s in sizes)), max(peaks[1], sum(s.pss for s in sizes) / 1e6)
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        watcher.join()
        if run.wait():
            said.seek(0)
            raise SystemExit(f"{said.read().decode(errors='replace')}\n{command} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - began, *peaks


def compare(commands: dict[str, str], folder: Path, sizes: list[int], *, runs: int, workers: str) -> None:
    """Every program's runs in turn, on every input; the first is the start-up."""
    started: dict[str, float] = {}
    for size in sizes:
        file = folder / f"{size}.jsonl"
        megabytes = file.stat().st_size / 1e6
        found: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(runs):
            for name, command in commands.items():
                out = folder / name / f"{size}-{run}"
                out.mkdir(parents=True)
                command = command.format(input=file, output=out / "out", tokenizer=folder / "tokenizer", workers=workers)
                cpu, wall, largest, together = measure(command)
                if size == sizes[0]:
                    found[name].append(cpu)
                    print(f"{name:8} start-up {cpu:.2f} CPU-s", flush=True)
                    continue
                found[name].append(megabytes / (cpu - started[name]))
                print(
                    f"{name:8} {megabytes:7.1f} MB  {cpu:6.2f} CPU-s  {found[name][-1]:5.2f} MB/CPU-s without start-up "
                    f"({megabytes / cpu:.2f} with)  {wall:6.1f} s  peak {largest:.0f} MB largest process, {together:.0f} MB together",
                    flush=True,
                )
        medians = {name: median(values) for name, values in found.items()}
        if size == sizes[0]:
            started = medians
        elif len(commands) > 1:
            ours, theirs = medians.values()
            firsts = [[next((folder / name / f"{size}-0").glob(f"*.{ending}")) for name in commands] for ending in ("bin", "idx")]
            same = all(filecmp.cmp(*pair, shallow=False) for pair in firsts)
            print(
                f"medians {ours:.2f} and {theirs:.2f} MB/CPU-s, ratio {ours / theirs:.2f}; {'equal' if same else 'different'} .bin and .idx"
            )


def main() -> None:
    from megalite.data.tokenizer import open_tokenizer
    from megalite.data.vocabulary import TRAINED, train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", default="12,48")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--corpus", help="jsonl file with the text in the field text")
    parser.add_argument("--tokenizer", default="train:bpe", help="train:bpe, train:wordpiece, train:unigram, or a folder")
    parser.add_argument("--against", help="command of another program, with {input} {output} {tokenizer} {workers}")
    parser.add_argument("--runs", type=int, default=1, help="of every program and size")
    arguments = parser.parse_args()
    commands = {"megalite": OURS} | ({"other": arguments.against} if arguments.against else {})
    if arguments.against:
        commands["megalite"] += " --splits 1,0,0 --split-sentences false"
    sizes = [int(size) * 10**6 for size in arguments.megabytes.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {size: (folder / f"{size}.jsonl").open("w", encoding="utf-8") for size in [1000, *sizes]}
        sample: list[str] = []
        for text in documents(arguments.corpus):
            if len(sample) < 8000:
                sample.append(text)
            for size, file in files.items():
                if file.tell() < size:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        for file in files.values():
            file.close()
        is_new = arguments.tokenizer in TRAINED
        tokenizer = train_tokenizer(arguments.tokenizer, sample, vocab_size=32000) if is_new else open_tokenizer(arguments.tokenizer)
        if "sep" in tokenizer.special:
            tokenizer.special.setdefault("eos", tokenizer.special["sep"])
        tokenizer.save(folder / "tokenizer")
        compare(commands, folder, list(files), runs=arguments.runs, workers=arguments.workers)


if __name__ == "__main__":
    main()
