"""Which documents repeat another: the answer of a brute-force comparison, for any cut into parts and shares."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megalite.data import duplicates
from megalite.data.duplicates import EXACT, GRAM, KEPT, NEAR, Duplicates, Finder, sketch
from megalite.data.parts import write_part

DRAW = random.Random(5)
VOCABULARY = [f"w{number}" for number in range(4000)]


def text(size: int = 120) -> list[str]:
    return DRAW.choices(VOCABULARY, k=size)


def altered(words: list[str], share: float) -> list[str]:
    """With the last words replaced."""
    return words[: round(len(words) * (1 - share))] + text(round(len(words) * share))


def jaccard(one: str, other: str) -> float:
    a, b = ({tuple(words[k : k + GRAM]) for k in range(len(words) - GRAM + 1)} for words in (one.split(), other.split()))
    return len(a & b) / len(a | b)


def find(texts: list[str], folder: Path, settings: Duplicates, *, size: int = 7) -> tuple[list[int], list[int]]:
    paths, counts = [], []
    for number, at in enumerate(range(0, len(texts), size)):
        some = texts[at : at + size]
        path = folder / f"{size}-{number}.part"
        write_part(path, {"summary": np.frombuffer(b"{}", np.uint8), **sketch(some, settings)})
        paths.append(path)
        counts.append(len(some))
    first, how = Finder(paths, counts, settings).find()
    return first.tolist(), how.tolist()


@pytest.fixture(scope="module")
def corpus() -> tuple[list[str], dict[int, int]]:
    """60 documents; 15 equal ones but for spaces and case, 15 nearly equal, 15 that share a third."""
    originals = [text() for _ in range(60)]
    repeats = {}
    texts = [" ".join(words) for words in originals]
    for number in range(15):
        repeats[len(texts)] = number
        texts.append("  ".join(originals[number]).upper())
    for number in range(15, 30):
        repeats[len(texts)] = number
        texts.append(" ".join(altered(originals[number], 0.04)))
    for number in range(30, 45):
        texts.append(" ".join(altered(originals[number], 0.6)))
    return texts, repeats


def test_equal_and_near_documents_are_found_and_others_stay(corpus, tmp_path: Path) -> None:
    texts, repeats = corpus
    first, how = find(texts, tmp_path, Duplicates())
    assert {number: of for number, of in enumerate(first) if of != number} == repeats
    assert [how[number] for number in repeats] == [EXACT] * 15 + [NEAR] * 15
    assert all(how[number] == KEPT for number in range(len(texts)) if number not in repeats)
    assert min(jaccard(texts[a], texts[b]) for a, b in list(repeats.items())[15:]) > 0.85


def test_parts_and_shares_do_not_matter(corpus, tmp_path: Path, monkeypatch) -> None:
    texts, _ = corpus
    whole = find(texts, tmp_path, Duplicates(), size=1000)
    monkeypatch.setattr(duplicates, "SHARE", 16)
    assert find(texts, tmp_path, Duplicates(), size=3) == whole


def test_a_chain_of_near_documents_keeps_its_first(tmp_path: Path) -> None:
    words = text(200)
    chain = [words, words[:-8] + text(8)]
    chain.append(text(8) + chain[1][8:])
    first, _ = find([" ".join(each) for each in [*chain, text()]], tmp_path, Duplicates(threshold=0.7))
    assert first == [0, 0, 0, 3]


def test_only_what_is_asked_for_is_looked_for(corpus, tmp_path: Path) -> None:
    texts, _ = corpus
    assert find(texts, tmp_path, Duplicates(near=False), size=9)[1].count(NEAR) == 0
    assert find(texts, tmp_path, Duplicates(near=False), size=9)[1].count(EXACT) == 15
    assert find(texts, tmp_path, Duplicates(exact=False), size=11)[1].count(NEAR) == 30


def test_the_share_of_equal_hashes_estimates_what_two_texts_share() -> None:
    words = text(2000)
    errors = []
    for share in (0.05, 0.2, 0.4, 0.7):
        pair = [" ".join(words), " ".join(altered(words, share))]
        a, b = sketch(pair, Duplicates())["minhash"]
        errors.append(abs(float(np.mean(a == b)) - jaccard(*pair)))
    assert max(errors) < 0.15 and sum(errors) / len(errors) < 0.06


def test_chinese_is_compared_character_by_character(tmp_path: Path) -> None:
    one = "".join(chr(0x4E00 + DRAW.randrange(3000)) for _ in range(300))
    first, _ = find([one, one[:-6] + "完全不同的字", "".join(reversed(one))], tmp_path, Duplicates())
    assert first == [0, 0, 2]
