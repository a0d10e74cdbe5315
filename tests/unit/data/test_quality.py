"""The rules of Gopher and C4, each at its bound."""

from __future__ import annotations

import pytest
from common import WORDS

from megalite.data.quality import Languages, Lines, Quality, Repetition, judge_language, judge_quality, judge_repetition, strip_lines

PROSE = "The river and the house of stone have a garden that is to be seen with the light of summer, and people carry letters there.\n"
LONG = "\n".join(PROSE.strip().replace("river", word) for word in WORDS)
CHINESE = (
    "今天天气很好，我们一起去公园散步，看见了许多漂亮的花。孩子们在草地上奔跑，老人坐在长椅上聊天，大家都很高兴。回家以后我们做了晚饭。"  # noqa: RUF001
)


def test_prose_passes_every_rule() -> None:
    assert judge_quality(LONG, Quality()) is None
    assert judge_quality(CHINESE, Quality()) is None
    assert judge_repetition(CHINESE, Repetition()) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the and of to.", "fewer words"),
        (" ".join(["internationalization"] * 60), "mean word length above 10"),
        (" ".join(["ab"] * 60), "mean word length below 3"),
        (LONG + " # # # # # #" * 20, "hash marks"),
        (LONG + "..." * 100, "ellipses a word"),
        ("\n".join(f"- {line}" for line in LONG.split("\n")), "bullet"),
        ("\n".join(f"{line}..." for line in LONG.split("\n")), "ending in an ellipsis"),
        (LONG + " 1234 5678 9012" * 100, "without a letter"),
        ("People like rivers, houses, gardens. " * 20, "stop words"),
        (LONG + " Lorem ipsum dolor sit amet.", "lorem ipsum"),
    ],
)
def test_each_bound_is_named(text: str, reason: str) -> None:
    assert reason in (judge_quality(text, Quality()) or "passed")


def test_braces_count_only_where_asked() -> None:
    assert judge_quality(LONG + "{", Quality()) is None
    assert judge_quality(LONG + "{", Quality(braces=True)) == "curly brackets"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join([*WORDS, *["menu entry"] * 12]), "repeated lines"),
        ("\n\n".join(["a paragraph", "a paragraph", "another"]), "repeated lines"),
        (" ".join(WORDS) + " green tea" * 12, "most frequent 2-gram"),
        (" ".join([*WORDS, *(word.title() for word in WORDS)] * 2), "repeated 5-grams"),
    ],
)
def test_repetition_is_named(text: str, reason: str) -> None:
    assert judge_repetition(text, Repetition()) == reason


def test_a_text_just_below_the_bound_stays() -> None:
    lines = [f"{word} alone stands here" for word in WORDS[:9]]
    assert judge_repetition("\n".join([*lines, lines[0]]), Repetition(line_characters=0.11, paragraphs=1, ngrams=False)) is None


def test_languages_are_told_apart() -> None:
    rules = Languages(keep=("en", "zh"))
    assert judge_language(PROSE, rules) is None
    assert judge_language(CHINESE, rules) is None
    assert judge_language("Das ist ein deutscher Satz, der nicht bleiben darf, weil niemand ihn haben will.", rules) == "language de"
    with pytest.raises(ValueError, match="no such code"):
        Languages(keep=("xx",))


def test_boilerplate_lines_go_and_the_rest_stays_byte_for_byte() -> None:
    text = "First line.\n\nPlease enable JavaScript.\n  Indented\tline\nWe use cookies here\n"
    assert strip_lines(text, Lines()) == ("First line.\n\n  Indented\tline\n", 2)
    prose = "A long sentence about a privacy policy " + "that goes on " * 12
    assert strip_lines(prose, Lines()) == (prose, 0)


def test_the_rules_of_c4_can_be_asked_for() -> None:
    assert (
        strip_lines("Home\nThis is a whole sentence here.\nNo end to this one", Lines(punctuation=True, words=5))[0]
        == "This is a whole sentence here."
    )
