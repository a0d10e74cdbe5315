"""Models to fine-tune from and tiny tasks to fine-tune for: random weights, a tokenizer trained on the spot, nothing downloaded."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megalite import models
from megalite.checkpoint import store
from megalite.checkpoint.slices import Slice
from megalite.config import Config
from megalite.data.vocabulary import train_tokenizer
from megalite.layout import Cut

GOOD = ["good", "great", "lovely", "fine", "nice", "sweet", "bright", "happy"]
BAD = ["bad", "poor", "awful", "dark", "cruel", "bitter", "sad", "ugly"]
OTHER = [
    "the",
    "film",
    "was",
    "a",
    "story",
    "of",
    "people",
    "in",
    "town",
    "with",
    "music",
    "and",
    "rain",
    "we",
    "saw",
    "it",
    "last",
    "night",
    "and",
    "talked",
    "about",
    "that",
]
PAIRS = {
    "red": "rouge",
    "house": "maison",
    "dog": "chien",
    "sun": "soleil",
    "water": "eau",
    "bread": "pain",
    "night": "nuit",
    "day": "jour",
}


def make_start(folder: Path, family: str, *, style: str = "gpt2", width: int = 32, sequence: int = 32) -> Path:
    """A run folder with a checkpoint of random weights, as if trained with dropout, and its tokenizer."""
    kind = "train:wordpiece" if family == "bert" else "train:bpe"
    texts = [" ".join([*GOOD, *BAD, *OTHER, *PAIRS, *PAIRS.values(), "user: assistant: system:"])] * 3
    tokenizer = train_tokenizer(kind, texts, vocab_size=400)
    tokenizer.save(folder / "tokenizer")
    llama = {"positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False, "mlp": 64}
    config = Config.model_validate(
        {
            "name": "start",
            "model": {
                "family": family, "layers": 2, "width": width, "heads": 4, "vocab": tokenizer.vocab_size, "sequence": sequence,
                "init_std": 0.05, "dropout": 0.1,
                **({"activation": "gelu"} if family == "bert" else llama if style == "llama" else {}),
            },
            "data": {"tokenizer": str(folder / "tokenizer")},
        }
    )  # fmt: skip
    model, tied = config.model, models.tied(config.model)
    states = {
        name: Slice.lazily(partial(_draw, name, tuple(parameter.shape), config), cut=Cut(name, tuple(parameter.shape)))
        for name, parameter in models.build(model, seed=0, device="meta").named_parameters()
        if name not in tied
    }
    store.write_weights(folder / "checkpoints", 5, states, {"config": config.model_dump(mode="json"), "tokenizer": tokenizer.fingerprint})
    return folder


def _draw(name: str, shape: tuple[int, ...], config: Config) -> Tensor:
    return models.draw(name, shape, model=config.model, seed=9)


def reviews(path: Path, count: int, *, seed: int) -> Path:
    """Texts that one word decides, as .tsv."""
    draw = random.Random(seed)
    lines = ["text\tlabel"]
    for _ in range(count):
        good = draw.random() < 0.5
        words = draw.choices(OTHER, k=draw.randint(3, 12))
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if good else BAD))
        lines.append(f"{' '.join(words)}\t{'good' if good else 'bad'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tagged(path: Path, count: int, *, seed: int) -> Path:
    """Words with the tags B-G, B-B and O, as .jsonl."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices([*GOOD, *BAD, *OTHER, *OTHER], k=draw.randint(3, 10))
        rows.append({"tokens": words, "tags": [tag_of(word) for word in words]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tag_of(word: str) -> str:
    return "B-G" if word in GOOD else "B-B" if word in BAD else "O"


def counted(path: Path, count: int, *, seed: int) -> Path:
    """Texts and how many good words, less bad ones, are in them, as .csv."""
    draw = random.Random(seed)
    lines = ["text,label"]
    for _ in range(count):
        words = draw.choices([*GOOD, *BAD, *OTHER], k=8)
        lines.append(f'"{" ".join(words)}",{sum(word in GOOD for word in words) - sum(word in BAD for word in words)}')
    path.write_text("\n".join(lines) + "\n")
    return path


def translations(path: Path, count: int, *, seed: int) -> Path:
    """Word for word, as .tsv."""
    draw = random.Random(seed)
    rows = [draw.choices(list(PAIRS), k=draw.randint(1, 4)) for _ in range(count)]
    path.write_text("source\ttarget\n" + "".join(f"{' '.join(row)}\t{' '.join(PAIRS[word] for word in row)}\n" for row in rows))
    return path


def dialogues(path: Path, count: int, *, seed: int) -> Path:
    """Questions with one answer each, as .jsonl."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        asked = draw.sample(list(PAIRS), 2)
        turns = [[{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": f"it is {PAIRS[word]}"}] for word in asked]
        rows.append({"messages": [message for turn in turns for message in turn]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def megalite(*arguments: Any, code: int = 0) -> str:
    """Run a verb; what it said."""
    done = subprocess.run([sys.executable, "-m", "megalite", *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
