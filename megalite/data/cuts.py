"""Where text may be cut so that the parts, encoded one by one, have the ids that they have together.

In: a `tokenizers.Tokenizer`. Out: its `Cuts`, or None if it splits text in a way not listed here. Two sorts of places are sure:

- Between two words of the tokenizer's splitter, which encodes every word by itself. The kinds of the two characters tell. A kind is
  measured, by asking the splitter once about every character that occurs; no Unicode table of Python's has a say.
- Inside a word of byte-level BPE, between two characters that no entry of the vocabulary joins (`merges.py`): no merge goes over that
  place, so what is merged on either side does not depend on the other. Chinese has no spaces; this cuts it every two characters or so.

A character that fits no kind has no cut on either side.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megalite.data.merges import CHARACTERS, FAR, Joins, Merges, Single, read_model

if TYPE_CHECKING:
    import tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's, also cl100k's
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")

# Kinds of characters. A mark is what is neither letter, number nor white space. Contractions ("'ll") are Latin: far letters and marks
# have no part in them, and only between those are words cut.
UNKNOWN, LETTER, FAR_LETTER, NUMBER, MARK, FAR_MARK, QUOTE, BLANK, SPACE, LINE, UNSEEN = range(11)
LETTERS, MARKS, WHITE = (LETTER, FAR_LETTER), (MARK, FAR_MARK, QUOTE), (BLANK, SPACE, LINE)
SOLID = (*LETTERS, NUMBER, *MARKS)
# What may lie between two characters. MERGES, inside a word, becomes a cut if no entry joins them, and no cut if one joins parts of them.
NO, CUT, MERGES = range(3)


@dataclass(frozen=True)
class Rules:
    """How a tokenizer's text may be cut."""

    between: dict[tuple[int, int], int]
    """By the kinds of two neighbours; NO for those not listed."""
    breaks: tuple[int, ...] = ()
    """Where white space of several characters ends in one of these and something follows, there is a cut before the last of them."""


class Cuts:
    """Finds the places; learns characters as they come."""

    def __init__(self, kind: Callable[[str], int], rules: Rules, joins: Joins | None, simple: Merges | Single) -> None:
        self._kind, self._joins, self.simple = kind, joins, simple
        """`simple` knows the ids of characters, and of words between whose characters there is MERGES."""
        self._kinds = np.full(CHARACTERS, UNSEEN, np.uint8)
        self._table = np.zeros(256, np.uint8)  # 16 times the kind on the left and the kind on the right
        for (left, right), answer in rules.between.items():
            self._table[16 * left + right] = answer if joins or answer == CUT else NO
        self._breaks, self._white, self._solid = (np.isin(np.arange(16), kinds) for kinds in (rules.breaks, WHITE, SOLID))

    def find(self, codes: np.ndarray, last: np.ndarray) -> np.ndarray:
        """What lies behind every code point (n,) of texts in a row, `last` being their last places: CUT, NO or MERGES, uint8 (n,)."""
        kinds = self._kinds[codes]
        unseen = codes[kinds == UNSEEN]
        if len(unseen):
            for code in np.unique(unseen).tolist():
                self._kinds[code] = self._kind(chr(code))
                for learner in filter(None, (self._joins, self.simple)):
                    learner.learn(code)
            kinds = self._kinds[codes]
        follower = np.append(kinds[1:], UNKNOWN)
        follower[last] = UNKNOWN
        answers = self._table[16 * kinds + follower]
        if self._joins:
            at = np.flatnonzero(answers == MERGES)
            whole = MERGES if isinstance(self.simple, Merges) else NO
            answers[at] = np.array([CUT, whole, NO], np.uint8)[self._joins.between(codes[at], codes[at + 1])]
        white = self._white[kinds]
        strange = np.flatnonzero((kinds[:-1] == UNKNOWN) & white[1:]) + 1  # perhaps not the first of its white space
        answers[strange] = NO
        answers[np.flatnonzero(white[:-1] & self._breaks[kinds[1:]] & self._solid[follower[1:]])] = CUT
        answers[last] = CUT
        return answers


def cuts_of(backend: tokenizers.Tokenizer) -> Cuts | None:
    """Where this tokenizer's text may be cut, if that is known."""
    splitter, normalizer = _state(backend.pre_tokenizer), _state(backend.normalizer)
    if getattr(backend.model, "dropout", None):
        return None
    if splitter.get("type") == "BertPreTokenizer" and normalizer.get("type", "BertNormalizer") == "BertNormalizer":
        return Cuts(_bert_kind(backend), BERT, None, Single(backend))
    steps = splitter.get("pretokenizers", [splitter])
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"] or normalizer.get("type", "NFC") != "NFC":
        return None
    pattern = ""
    if len(steps) == 1 and byte_level.get("use_regex", True):
        pattern = GPT2
    elif len(steps) == 2 and not byte_level.get("use_regex", True) and steps[0].get("type") == "Split" and not steps[0]["invert"]:
        pattern = steps[0]["pattern"].get("Regex") if steps[0]["behavior"] == "Isolated" else ""
    if pattern not in RULES:
        return None
    joins, merges = read_model(backend) or (None, None)
    return Cuts(_byte_level_kind(backend, composes=bool(normalizer)), RULES[pattern], joins, merges or Single(backend))


def _state(part: object) -> dict[str, Any]:
    return json.loads(part.__getstate__()) if part is not None else {}  # pyright: ignore


def _table(*rules: tuple[tuple[int, ...], tuple[int, ...], int]) -> dict[tuple[int, int], int]:
    return {(left, right): answer for lefts, rights, answer in rules for left in lefts for right in rights}


# Read the expressions above: left to right, each word as long as its alternative allows, and nothing looks back. So a cut before a word
# leaves all words as they are, if the text on its left does not end in white space: there `(?!\S)` looks ahead.
_EITHER = (
    (SOLID, WHITE, CUT),  # no word goes on into white space
    (LETTERS, (NUMBER, *MARKS), CUT),
    ((NUMBER,), (*LETTERS, *MARKS), CUT),
    (MARKS, (NUMBER,), CUT),
    ((FAR_LETTER,), (FAR_LETTER,), MERGES),
    ((BLANK,), (FAR_LETTER,), MERGES),  # one blank belongs to the letters behind it
)
_LLAMA3 = Rules(
    _table(
        *_EITHER,
        (MARKS, (LINE,), NO),  # marks take line ends behind them,
        (MARKS, (FAR_LETTER,), MERGES),  # or one mark takes letters: hence no cut between marks
        ((LINE,), SOLID, CUT),  # `\s*[\r\n]+` does not look ahead
    ),
    breaks=(BLANK, SPACE),
)
RULES = {
    GPT2: Rules(
        _table(
            *_EITHER,
            ((MARK, FAR_MARK), LETTERS, CUT),  # a quote may begin a contraction
            ((FAR_MARK,), (FAR_MARK,), MERGES),
            ((SPACE, LINE), SOLID, CUT),  # the last white character, unless a blank, is a word; `breaks` leaves it alone
        ),
        breaks=WHITE,
    ),
    LLAMA3: _LLAMA3,
    QWEN2: _LLAMA3,
}
BERT = Rules(_table(((LETTER,), (MARK, SPACE), CUT), ((MARK, SPACE), (LETTER, MARK, SPACE), CUT)))


def _byte_level_kind(backend: tokenizers.Tokenizer, *, composes: bool) -> Callable[[str], int]:
    """What these expressions take a character for, found by what they leave in one word."""
    split = backend.pre_tokenizer.pre_tokenize_str
    seconds = _seconds() if composes else frozenset()

    def kind(character: str) -> int:
        if composes and not _stands_alone(character, seconds):
            return UNKNOWN
        if character in "'\r\n":
            return QUOTE if character == "'" else LINE
        if len(split("a" + character)) == 1:
            return LETTER if character < FAR else FAR_LETTER
        if len(split("!" + character)) == 1:
            return MARK if character < FAR else FAR_MARK
        if len(split("\t" + character)) == 1:
            return BLANK if character == " " else SPACE
        return NUMBER

    return kind


def _seconds() -> frozenset[str]:
    """Characters that NFC may join with the one before (Unicode Standard Annex 15)."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(CHARACTERS))
    jamo = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))
    return frozenset([chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"] + list(map(chr, jamo)))


def _stands_alone(character: str, seconds: frozenset[str]) -> bool:
    """NFC neither changes it nor joins it with what comes before, in no version of Unicode.

    What is assigned keeps its decomposition and its class for ever (Unicode's stability policy), and to an older version it is a
    character that nothing happens to.
    """
    return (
        unicodedata.category(character) != "Cn"
        and not unicodedata.combining(character)
        and character not in seconds
        and unicodedata.is_normalized("NFC", character)
    )


def _bert_kind(backend: tokenizers.Tokenizer) -> Callable[[str], int]:
    """BERT treats every character by itself: it separates, is a word of its own, or belongs to a word (or is dropped)."""
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    split = backend.pre_tokenizer.pre_tokenize_str

    def kind(character: str) -> int:
        words = [word for word, _ in split(normalize(f"a{character}a"))]
        if words == ["a", "a"]:
            return SPACE
        if len(words) == 3 and words[0] == words[2] == "a":
            return MARK
        # NFD, with which accents are stripped, changes the order of combining characters.
        alone = len(words) == 1 and unicodedata.category(character) not in ("Mn", "Mc", "Me", "Cn")
        return LETTER if alone else UNKNOWN

    return kind
