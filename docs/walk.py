"""Rows for the walk of docs/walk.md, made of what every Python has: nothing is downloaded.

In: a folder.  Out: snippets.{train,few,valid,test}.tsv (a piece of the standard library, and its package), en-zh.{train,test}.tsv
(sentences of a small grammar, and their Chinese), talks.jsonl (what a module is for, by its docstring). Run: python docs/walk.py walk
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sys
import sysconfig
from pathlib import Path

LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("asyncio", "email", "idlelib", "multiprocessing", "tkinter", "unittest", "xml")
LINES = 6  # of a snippet
ROWS = {"test": 50, "valid": 20, "train": 80}  # of a package
FEW = 20  # of them, once more in a file of their own
WHO = {
    "I": "我",
    "you": "你",
    "we": "我们",
    "they": "他们",
    "the teacher": "老师",
    "my friend": "我的朋友",
    "the child": "孩子",
    "the doctor": "医生",
}
DOES = {"read": "读", "buy": "买", "see": "看见", "like": "喜欢", "need": "需要", "find": "找到", "draw": "画", "sell": "卖"}
LIKE = {"a red": "红色的", "a big": "大的", "a small": "小的", "a new": "新的", "an old": "旧的", "a beautiful": "漂亮的"}
WHAT = {"book": "书", "house": "房子", "car": "汽车", "flower": "花", "table": "桌子", "picture": "图片", "horse": "马", "lamp": "灯"}
WHEN = {"today": "今天", "tomorrow": "明天", "every day": "每天", "in the morning": "早上", "in the evening": "晚上"}
WHERE = {"in the city": "在城市里", "at school": "在学校", "at home": "在家", "in the park": "在公园"}


def snippets() -> dict[str, list[tuple[str, str]]]:
    """As many of each package, split by file: no file is in two of them."""
    found: dict[str, list[tuple[str, str]]] = {split: [] for split in ROWS}
    for package in PACKAGES:
        files = [path for path in (LIBRARY / package).rglob("*.py") if not {"test", "tests", "idle_test"} & set(path.parts)]
        files.sort(key=lambda path: hashlib.sha256(str(path.relative_to(LIBRARY)).encode()).digest())
        for split, most in ROWS.items():
            rows: list[tuple[str, str]] = []
            while files and len(rows) < most:
                rows += [(text, package) for text in pieces(files.pop()) if package not in text.lower()]  # else it would be too easy
            random.Random(0).shuffle(rows)
            found[split] += rows[:most]
    found["few"] = [row for package in PACKAGES for row in [r for r in found["train"] if r[1] == package][:FEW]]
    for rows in found.values():
        random.Random(0).shuffle(rows)
    return found


def pieces(path: Path) -> list[str]:
    """Every other LINES lines, white space and empty lines taken out."""
    lines = [" ".join(line.split()) for line in path.read_text("utf-8", errors="ignore").splitlines() if line.strip()]
    return [" ".join(lines[at : at + LINES])[:400] for at in range(0, len(lines) - LINES, 2 * LINES)]


def sentence(draw: random.Random) -> tuple[str, str]:
    """English puts time and place last, Chinese before the verb."""
    drawn = [draw.choice(list(words.items())) for words in (WHO, DOES, LIKE, WHAT, WHEN, WHERE)]
    (who, a), (does, b), (like, c), (what, d), (when, e), (where, f) = drawn
    place, there = (f" {where}", f) if draw.random() < 0.5 else ("", "")
    return f"{who} {does} {like} {what}{place} {when}", f"{a}{e}{there}{b}{c}{d}"


def talks() -> list[dict[str, list[dict[str, str]]]]:
    """The first line of a module's docstring, asked for in one of several ways."""
    found = []
    for path in sorted(LIBRARY.glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        if said and 20 < len(line := said.strip().splitlines()[0]) < 60:
            found += [
                {"messages": [{"role": "user", "content": way.format(path.stem)}, {"role": "assistant", "content": line}]}
                for way in ("What is {}?", "what does the module {} do", "Tell me about {}.")
            ]
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in snippets().items():
        (folder / f"snippets.{split}.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), "utf-8")
    draw = random.Random(1)
    pairs = sorted({sentence(draw) for _ in range(3000)})
    draw.shuffle(pairs)
    for split, rows in (("test", pairs[:200]), ("train", pairs[200:])):
        (folder / f"en-zh.{split}.tsv").write_text("source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in rows), "utf-8")
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks()), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "walk"))
