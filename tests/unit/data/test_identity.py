"""De-identification: it finds what is labelled, kind by kind, and touches nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.data.identity import NAMES, Identity, Veil, find
from megalite.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from identities import MAKERS, generate, measure

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, float, int]]:
    return measure(generate(1200, seed=7))[0]


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_recall_is_above_98_and_precision_above_95_percent(kind: str, measured) -> None:
    precision, recall, number = measured[kind]
    assert number > 200
    assert recall > 0.98 and precision > 0.95, (precision, recall)


def test_every_kind_is_measured() -> None:
    assert set(MAKERS) == set(NAMES)


def test_nothing_outside_the_matches_changes() -> None:
    veil = Veil(Identity())
    for document in generate(100, seed=3):
        spans = [(c.start, c.stop) for _, c in find(document.text, Identity())]
        left = re.split("<(?:" + "|".join(name.upper() for name in NAMES) + ")>", veil.hide(document.text)[0])
        edges = [0, *(edge for span in spans for edge in span), len(document.text)]
        assert left == [document.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


@given(st.text(alphabet="0123456789 -+().:@aAeF/é号x\n", max_size=60))
def test_what_was_hidden_once_stays_as_it_is(text: str) -> None:
    veil = Veil(Identity())
    once, _ = veil.hide(text)
    assert veil.hide(once)[0] == once


def test_a_kind_that_is_not_named_stays() -> None:
    text = "a.b@example.com 13800138000"
    assert Veil(Identity(kinds=("phone",))).hide(text)[0] == "a.b@example.com <PHONE>"


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return str(path)


def test_one_number_written_two_ways_gets_one_pseudonym_and_another_key_gives_another(key: str, tmp_path: Path) -> None:
    veil = Veil(Identity(replace="pseudonym", key=key))
    one, _ = veil.hide("call 13800138000 or +86 138 0013 8000 or 13900139000")
    first, second, third = re.findall(r"<PHONE:([a-p]{12})>", one)
    assert first == second != third
    other = tmp_path / "other"
    other.write_text(SECRET[::-1])
    assert Veil(Identity(replace="pseudonym", key=str(other))).name("phone", "+8613800138000") != f"<PHONE:{first}>"
    assert veil.hide(one)[0] == one


def test_a_pseudonym_without_a_key_or_with_a_short_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pseudonyms need a key"):
        Identity(replace="pseudonym")
    short = tmp_path / "short"
    short.write_text("abc")
    with pytest.raises(UserError, match="3 bytes"):
        Veil(Identity(replace="pseudonym", key=str(short)))
    with pytest.raises(UserError, match="No such file"):
        Veil(Identity(replace="pseudonym", key=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4",
        "127.0.0.1",
        "2024-01-15",
        "4111 1111 1111 1112",
        "11010119900307123X0",
        "dead::beef",
        "user@localhost",
        "v10.20.30.40",
    ],
)
def test_look_alikes_stay(text: str) -> None:
    assert Veil(Identity()).hide(text)[0] == text


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("电话13800138000，", "电话<PHONE>，"),  # noqa: RUF001
        ("身份证11010519491231002X。", "身份证<RESIDENT>。"),
        ("https://bob:s3cret@host.org/x", "https://<URL>@host.org/x"),
        ('{"password": "kJ8x2pQ9vL4m"}', '{"password": "<KEY>"}'),
        ("4111-1111-1111-1111", "<CARD>"),
        ("DE89 3704 0044 0532 0130 00 BLZ", "<IBAN> BLZ"),
        ("fe80::1ff:fe23:4567:890a", "<IP>"),
    ],
)
def test_known_values_give_way(text: str, hidden: str) -> None:
    assert Veil(Identity()).hide(text)[0] == hidden
