"""`prepare --clean` end to end: what is left, what is said of the rest, the same bytes whatever happens on the way."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from common import WORDS
from rich.console import Console

from megalite.data import prepare as preparing
from megalite.data.manifest import Manifest
from megalite.data.prepare import Preparation, prepare
from megalite.data.shards import Shard
from megalite.data.tokenizer import stored_tokenizer
from megalite.errors import UserError

STEPS = """
unicode: true
lines: true
languages: {keep: [en, zh]}
quality: {words: [8, 100000]}
repetition: true
identity: true
duplicates: true
"""
NAMES = ("unicode", "lines", "languages", "quality", "repetition", "identity", "duplicates")
SECRETS = ("13800138000", "john.doe@example.com")


def make_corpus(folder: Path) -> tuple[Path, Path]:
    """Two files; repeats lie in the second, of documents in the first."""
    draw = random.Random(2)

    def prose(size: int = 70) -> str:
        return "The house of stone " + " ".join(draw.choices(("the", "of", "and", *WORDS), k=size)) + "."

    first = [prose() for _ in range(40)]
    first[5] += f" Call {SECRETS[0]} or write to {SECRETS[1]} and ask."
    second = [
        first[3], first[4] + " Added.", "Das ist ein deutscher Satz, der nicht bleiben darf, weil ihn niemand haben will.",
        "The green house of stone is near the open river and the small garden. " * 12,
        "The â€œriverâ€\x9d of the house. " + prose(30) + "\nPlease enable JavaScript.\nThe end of it.", "This is a short text.", "   ",
    ]  # fmt: skip
    for name, texts in (("a", first), ("b", second)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "a.jsonl", folder / "b.jsonl"


def run(folder: Path, inputs: tuple[Path, ...], name: str = "out", steps: str = STEPS, **settings) -> tuple[Manifest, str]:
    (folder / "clean.yaml").write_text(steps)
    said = io.StringIO()
    request = {
        "inputs": tuple(map(str, inputs)), "output": str(folder / name), "tokenizer": "train:bpe", "vocab_size": 300, "workers": 1,
        "splits": (1, 0, 0), "clean": str(folder / "clean.yaml"), **settings,
    }  # fmt: skip
    return prepare(Preparation.model_validate(request), console=Console(file=said, soft_wrap=True)), said.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("clean")
    _, said = run(folder, make_corpus(folder), report=True)
    return folder, said


def texts(prefix: Path) -> list[str]:
    shard, tokenizer = Shard(f"{prefix}.train"), stored_tokenizer(f"{prefix}.train")
    assert tokenizer is not None
    return [tokenizer.decode(shard.sequence(number)[:-1]) for number in range(shard.num_sequences)]


def test_what_is_left_is_clean(done) -> None:
    left = texts(done[0] / "out")
    assert len(left) == 41
    assert not any(secret in text for text in left for secret in SECRETS)
    assert "Call <PHONE> or write to <EMAIL> and ask." in left[5]
    assert left[-1].startswith("The “river” of the house.") and "JavaScript" not in left[-1] and left[-1].endswith("\nThe end of it.")


def test_the_tokenizer_never_saw_what_was_removed(done) -> None:
    vocabulary = (done[0] / "out.tokenizer/tokenizer.json").read_text()
    assert "example.com" not in vocabulary and "138001" not in vocabulary


def test_the_report_names_places_and_reasons_and_repeats_nothing(done) -> None:
    folder, _ = done
    text = (folder / "out.removed.jsonl").read_text()
    assert not any(secret in text for secret in SECRETS)
    events = [json.loads(line) for line in text.splitlines()]
    assert {event["step"] for event in events if event["removed"]} == {"languages", "quality", "repetition", "duplicates"}
    first = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    hidden = next(event for event in events if event["step"] == "identity")
    place = f"{folder}/a.jsonl byte {sum(map(len, first[:5]))}"
    assert hidden == {"where": place, "step": "identity", "removed": False, "found": {"phone": 1, "email": 1}}
    repeated = {event["of"]: event["found"] for event in events if event["step"] == "duplicates"}
    assert repeated == {
        f"{folder}/a.jsonl byte {sum(map(len, first[:3]))}": {"exact": 1}, f"{folder}/a.jsonl byte {sum(map(len, first[:4]))}": {"near": 1}
    }  # fmt: skip


def test_the_card_counts_documents_and_characters_behind_every_step(done) -> None:
    folder, said = done
    card = json.loads((folder / "out.card.json").read_text())
    counts = [card["steps"][name]["documents"] for name in ("read", *NAMES)]
    assert counts == [46, 46, 46, 45, 44, 43, 43, 41]
    assert sum(map(len, texts(folder / "out"))) == card["steps"]["duplicates"]["characters"]
    assert card["splits"]["train"]["documents"] == 41 and card["tokenizer"]["fingerprint"] == Manifest.find(folder / "out").tokenizer  # type: ignore[union-attr]
    page = (folder / "out.card.md").read_text()
    assert "| duplicates | 41 |" in page and str(folder / "b.jsonl") in page
    assert "duplicates: 2 of 43 documents out" in said


def test_the_same_bytes_come_from_two_workers_and_after_a_kill(done, tmp_path: Path, monkeypatch) -> None:
    folder, _ = done
    inputs = folder / "a.jsonl", folder / "b.jsonl"
    monkeypatch.setattr(preparing, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, inputs, workers=2)
    assert list((tmp_path / "out.parts").glob("*.part"))
    monkeypatch.undo()
    cleaned = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").glob("*.part")}
    monkeypatch.setattr(preparing, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, inputs, workers=2)
    assert cleaned == {path: path.stat().st_mtime_ns for path in cleaned}, "what was cleaned is cleaned again"
    monkeypatch.undo()
    run(tmp_path, inputs, workers=2)
    for ending in ("train.bin", "train.idx"):
        assert (tmp_path / f"out.{ending}").read_bytes() == (folder / f"out.{ending}").read_bytes()


def test_other_settings_or_another_key_make_it_anew_and_the_same_ones_do_not(tmp_path: Path) -> None:
    inputs = make_corpus(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("a secret of enough bytes")
    steps = f"identity: {{replace: pseudonym, key: {secret}}}"
    assert "prepared" in run(tmp_path, inputs, steps=steps)[1].splitlines()[-1]
    assert "nothing to do" in run(tmp_path, inputs, steps=steps)[1]
    secret.write_text("another secret of enough bytes")
    assert "nothing to do" not in run(tmp_path, inputs, steps=steps)[1]
    assert "another secret" not in (tmp_path / "out.card.json").read_text()


def test_a_long_file_in_several_pieces_is_cleaned_and_stays_one_document(tmp_path: Path) -> None:
    lines = [f"Line {number} of the house, write to someone{number}@example.com today" for number in range(30_000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    (tmp_path / "short.txt").write_text("The house of the river and of the stone is small.\n" * 3)
    manifest, _ = run(
        tmp_path, (tmp_path / "long.txt", tmp_path / "short.txt"), steps="identity: true\nquality: {words: [5, 9]}\nduplicates: true"
    )
    assert manifest.counts["train"]["documents"] == 1
    text = "".join(texts(tmp_path / "out"))
    assert text.count("<EMAIL>") == 30_000 and "@example" not in text


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("quality: {word: 3}", "quality.word is no setting; did you mean words"),
        ("idenity: true", "idenity is no setting; did you mean identity"),
        ("identity: {kinds: [emails]}", "identity.kinds.0 = 'emails'"),
        ("languages: {keep: [english]}", "no such code"),
        ("", "names no step"),
        ("[", "is no YAML"),
        ("duplicates: {threshold: 0.2}", "greater than or equal to 0.5"),
        ("quality: {words: [100000, 200000]}", "cleaning left no document"),
    ],
)
def test_bad_settings_are_refused_in_one_line(steps: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, make_corpus(tmp_path), steps=steps)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_a_report_without_cleaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--report"):
        run(tmp_path, make_corpus(tmp_path), clean=None, report=True)


def test_a_plain_preparation_has_a_card_too(tmp_path: Path) -> None:
    run(tmp_path, make_corpus(tmp_path), clean=None)
    card = json.loads((tmp_path / "out.card.json").read_text())
    assert card["steps"] is None and card["splits"]["train"]["documents"] == 46
