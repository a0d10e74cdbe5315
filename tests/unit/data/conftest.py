"""Real text and small tokenizers, made once for all tests of the data path."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import TRAINED, train_tokenizer

ODD = [
    "a document that spells <|endoftext|> and [MASK] and </s>",
    "Ünïcödé, 日本語。and 🙂!\tTabs\r\nand   spaces",
    "One sentence. Dr. Smith wrote another one! Did he?\n\nA new paragraph, e.g. this one. And its end.",
    "",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A good MB of real source code in documents of some kB, and odd ones."""
    found, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text("utf-8")
        found += [text[at : at + 5000] for at in range(0, len(text), 5000)]
        size += len(text)
        if size > 1_300_000:
            break
    return found[:20] + ODD + found[20:]


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(kind, texts[:100], vocab_size=800) for kind in TRAINED}


@pytest.fixture(scope="session")
def bpe(trained: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    trained["train:bpe"].save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def wordpiece(trained: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("wordpiece") / "tokenizer"
    trained["train:wordpiece"].save(folder)
    return str(folder)
