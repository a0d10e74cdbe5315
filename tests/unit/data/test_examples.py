"""From rows to what a model reads: exact ids, exact labels, and every kind of bad row counted with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megalite.data import chat
from megalite.data.examples import IGNORE, Encoder, columns_of, labels_of
from megalite.data.grouped import Batches, Once, Shuffled, balance
from megalite.data.lessons import check_family, read_lessons
from megalite.data.rows import Faults, Row, read_rows
from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import train_tokenizer
from megalite.errors import UserError
from megalite.task import Task

TEXT = ["the cat sat on the mat and a dog ran off, user: assistant: system: 你好 世界 chat of the day"] * 4


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train_tokenizer("train:wordpiece", TEXT, vocab_size=200)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer("train:bpe", TEXT, vocab_size=300)


def task(kind: str, **settings) -> Task:
    return Task(kind=kind, start="x", train=("x",), **settings)  # type: ignore[arg-type]


def encode(kind: str, tokenizer: Tokenizer, *values: tuple, family: str = "gpt", limit: int = 64, skip: bool = False, **settings):
    rows = [Row(value, f"row {number}") for number, value in enumerate(values)]
    template = settings.pop("template", None)
    return Encoder(task(kind, **settings), tokenizer, family, limit, template).encode(rows, Faults(refuse=not skip))


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist())


def test_bert_reads_a_pair_between_its_marks(wordpiece: Tokenizer) -> None:
    (example,) = encode("classify", wordpiece, ("the cat", "a dog", "b"), family="bert", labels=("a", "b")).found
    assert text_of(wordpiece, example.ids) == "[CLS] the cat [SEP] a dog [SEP]"
    assert example.target == 1 and example.ids[example.second] == wordpiece.encode_batch(["a"])[0][0]


def test_a_long_pair_loses_the_end_of_the_longer_text_and_keeps_its_marks(wordpiece: Tokenizer) -> None:
    found = encode("classify", wordpiece, ("the cat sat on the mat and a dog ran", "a dog", "b"), family="bert", labels=("a", "b"), limit=9)
    assert text_of(wordpiece, found.found[0].ids) == "[CLS] the cat sat on [SEP] a dog [SEP]"
    assert found.cut == 1


def test_only_the_first_piece_of_a_word_is_tagged(wordpiece: Tokenizer) -> None:
    (example,) = encode("tag", wordpiece, (["the", "catdog", "sat"], ["O", "X", "O"]), family="bert", labels=("O", "X")).found
    pieces = wordpiece.encode_batch(["catdog"])[0]
    assert len(pieces) > 1
    assert example.labels is not None
    assert example.labels.tolist() == [IGNORE, 0, 1, *[IGNORE] * (len(pieces) - 1), 0, IGNORE]


def test_a_translation_is_learned_and_its_prompt_is_not(bpe: Tokenizer) -> None:
    (example,) = encode("translate", bpe, ("the cat", "世界"), prompt="{source} = ").found
    full = np.append(example.ids, example.labels[-1])  # type: ignore[index]
    assert text_of(bpe, full) == "the cat = 世界<|endoftext|>"
    learned = full[1:][example.labels != IGNORE]
    assert text_of(bpe, learned) == "世界<|endoftext|>"
    assert (example.labels == np.where(example.labels != IGNORE, full[1:], IGNORE)).all()


def test_of_a_conversation_the_assistants_turns_alone_are_learned(bpe: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "the chat of the day"},
        {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "a dog"}, {"role": "assistant", "content": "ran off"},
    ]  # fmt: skip
    (example,) = encode("chat", bpe, (messages,)).found
    labels = example.labels
    assert labels is not None
    full = np.append(example.ids, labels[-1])
    asked = "system: the chat of the day\nuser: the cat\nassistant: "
    assert text_of(bpe, full[: int(np.argmax(labels != IGNORE)) + 1]) == asked
    assert text_of(bpe, full[1:][labels != IGNORE]) == "sat on<|endoftext|>ran off<|endoftext|>"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_tokenizers_own_template_is_kept_to_and_the_prompt_is_its_beginning(bpe: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
    pieces = chat.encode(messages, bpe, template=CHATML)
    assert [(text_of(bpe, ids), learned) for ids, learned in pieces] == [
        ("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", False), ("sat on<|im_end|>", True)
    ]  # fmt: skip
    assert pieces[0][0].tolist() == chat.prompt(messages[:1], bpe, template=CHATML).tolist()


def test_a_special_token_spelled_in_a_message_stays_text(bpe: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the<|endoftext|>cat"}, {"role": "assistant", "content": "sat<|endoftext|>on"}]
    ids = np.concatenate([piece for piece, _ in chat.encode(messages, bpe)])
    assert (ids == bpe.special["eos"]).sum() == 1, "the template's own"


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no messages"), ("{", "no JSON"), ([{"role": "user", "content": "x"}], "no turn of the assistant"),
        ([{"role": "bot", "content": "x"}], "needs a role"), ([{"role": "user", "content": " "}], "empty message"),
        ([{"role": "user"}], "needs a role"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_place(messages, why: str, bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"row 0: .*{why}"):
        encode("chat", bpe, (messages,))


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("classify", ("", "a"), "empty"), ("classify", ("the cat", "c"), "none of those of the training rows"),
        ("classify", (3, "a"), "int instead"),
        ("classify", ("the", " "), "empty label"),
        ("regress", ("the cat", "high"), "no number"), ("regress", ("the cat", "nan"), "no number"),
        ("tag", (["the"], ["a", "b"]), "1 tokens and 2 tags"), ("tag", ([], []), "empty"), ("tag", (["the"], ["c"]), "tag 'c'"),
        ("translate", (" ", "x"), "empty"), ("lm", ("",), "empty"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_or_counted(kind: str, value: tuple, why: str, bpe: Tokenizer) -> None:
    good = {
        "classify": ("the cat", "a"),
        "regress": ("the cat", "1.5"),
        "tag": (["the"], ["a"]),
        "translate": ("a", "b"),
        "lm": ("the cat",),
    }[kind]
    with pytest.raises(UserError, match=f"row 1: .*{why}"):
        encode(kind, bpe, good, value, labels=("a", "b"))
    found = encode(kind, bpe, good, value, good, labels=("a", "b"), skip=True)
    assert len(found.found) == 2 and sum(found.faults.counts.values()) == 1
    assert found.faults.places[0].startswith("row 1: ")


def test_no_row_left_says_why(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no row is left .*empty 2"):
        encode("lm", bpe, ("",), (" ",), skip=True)


def test_long_text_becomes_several_examples_and_loses_no_target(bpe: Tokenizer) -> None:
    found = encode("lm", bpe, ("the cat sat on the mat and a dog ran off " * 4,), limit=16).found
    whole = [*bpe.encode_batch(["the cat sat on the mat and a dog ran off " * 4])[0].tolist(), bpe.special["eos"]]
    assert np.concatenate([e.labels for e in found if e.labels is not None]).tolist() == whole[1:]
    assert np.concatenate([e.ids for e in found]).tolist() == whole[:-1]
    assert max(len(e.ids) for e in found) == 16


# ---- rows ------------------------------------------------------------------------------------------------------------------------------


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": 'he said "no", twice', "label": "a"}, {"text": "你好", "label": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    files = [
        write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        write(tmp_path / "x.tsv", "label\ttext\n" + "".join(f"{row['label']}\t{row['text']}\r\n" for row in rows)),
        write(tmp_path / "x.csv", 'text,label\n"he said ""no"", twice",a\n你好,b\n'),
        str(tmp_path / "x.parquet"),
    ]
    for file in files:
        assert [row.values for row in read_rows([file], ["text", "label"], Faults(refuse=True))] == [tuple(row.values()) for row in rows]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.tsv", "text\tlable\na\tb\n", "has no column label .it has text, lable."),
        ("x.tsv", "text\tlabel\na\tb\nc\n", "x.tsv row 3: 1 columns instead of 2"),
        ("x.tsv", b"text\tlabel\n" + "好\ta\n".encode("gb18030"), "x.tsv:2 is no UTF-8"),
        ("x.csv", "", "is empty"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text"\n', "x.jsonl:2: no JSON"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": null, "label": "b"}\n', "x.jsonl:2: no text"),
        ("x.jsonl", b'{"text": "a", "label": "b"}\n\xff\n', "x.jsonl:2: no UTF-8"),
        ("x.doc", "x", "of no known kind"),
        ("x.parquet", "x", "no parquet file"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(name: str, data: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        list(read_rows([write(tmp_path / name, data)], ["text", "label"], Faults(refuse=True)))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"none.tsv does not exist"):
        list(read_rows(["none.tsv"], ["text"], Faults(refuse=True)))


def test_labels_come_from_the_training_rows_alone(tmp_path: Path, bpe: Tokenizer) -> None:
    train = write(tmp_path / "t.tsv", "text\tlabel\nthe cat\t10\na dog\t9\n")
    valid = write(tmp_path / "v.tsv", "text\tlabel\nthe cat\t10\na dog\t11\n")
    settings = {"kind": "classify", "start": "x", "train": (train,), "valid": (valid,)}
    read = {"family": "gpt", "limit": 16, "folder": ""}
    with pytest.raises(UserError, match=r"v.tsv row 3: label '11' is none of those"):
        read_lessons(Task.model_validate(settings), bpe, **read)
    found, _, held = read_lessons(Task.model_validate({**settings, "bad_rows": "skip"}), bpe, **read)
    assert (
        found.labels == ("9", "10") and held is not None and held.faults.counts == {"label '11' is none of those of the training rows": 1}
    )


def test_one_label_or_a_wrong_number_of_columns_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    train = write(tmp_path / "t.tsv", "text\tlabel\nthe cat\ta\na dog\ta\n")
    with pytest.raises(UserError, match="the label a alone"):
        read_lessons(Task(kind="classify", start="x", train=(train,)), bpe, family="gpt", limit=16, folder="")
    with pytest.raises(UserError, match="names 1, classify reads 2 or 3"):
        columns_of(task("classify", columns=("text",)))
    assert labels_of([Row(("x", "b"), ""), Row(("x", "a"), "")], task("classify")) == ("a", "b")


def test_a_model_that_cannot_do_the_task_is_refused(wordpiece: Tokenizer) -> None:
    with pytest.raises(UserError, match="a BERT does not"):
        check_family(task("translate"), "bert", wordpiece)
    with pytest.raises(UserError, match="no eos token"):
        check_family(task("lm"), "gpt", wordpiece)


# ---- batches ---------------------------------------------------------------------------------------------------------------------------


def batches(bpe: Tokenizer, count: int = 101) -> Batches:
    draw = np.random.default_rng(0)
    rows = [(" ".join(["cat"] * int(draw.integers(1, 40))), "a" if draw.random() < 0.2 else "b") for _ in range(count)]
    examples = encode("classify", bpe, *rows, labels=("a", "b")).found
    return Batches(examples, kind="classify", family="gpt", longest=48, pad=0, multiple=8, weights=balance(examples, 2))


def test_every_example_comes_once_an_epoch_and_like_lengths_together(bpe: Tokenizer) -> None:
    made = batches(bpe, 96)
    grouped, plain = (Shuffled(made, global_batch=8, seed=1, group=group) for group in (True, False))
    assert grouped.mean_length < plain.mean_length
    for source in (grouped, plain):
        seen = [int(number) for step in range(12) for number in source.members(step)]
        assert sorted(seen) == list(range(96))
        later = [int(number) for step in range(12, 24) for number in source.members(step)]
        assert sorted(later) == list(range(96)) and later != seen


def test_a_sample_is_a_function_of_seed_and_number(bpe: Tokenizer) -> None:
    one, other = (Shuffled(batches(bpe), global_batch=8, seed=seed, group=True) for seed in (1, 1))
    third = Shuffled(batches(bpe), global_batch=8, seed=2, group=True)
    numbers = [77, 3, 500, 4]
    assert all((one.sample(n)["ids"] == other.sample(n)["ids"]).all() for n in [*numbers, *numbers[::-1]])
    assert any(
        len(one.sample(n)["ids"]) != len(third.sample(n)["ids"]) or (one.sample(n)["ids"] != third.sample(n)["ids"]).any() for n in numbers
    )


def test_all_samples_of_a_step_have_one_length_and_few_lengths_occur(bpe: Tokenizer) -> None:
    source = Shuffled(batches(bpe), global_batch=8, seed=1, group=True)
    lengths = [{len(source.sample(step * 8 + place)["ids"]) for place in range(8)} for step in range(20)]
    assert all(len(step) == 1 for step in lengths)
    assert {length for step in lengths for length in step} <= set(range(8, 49, 8))


def test_an_examination_counts_every_example_once_and_fillers_nothing(bpe: Tokenizer) -> None:
    made = Batches(batches(bpe, 21).examples, kind="classify", family="gpt", longest=48, pad=0, multiple=8)
    once = Once(made, global_batch=8)
    samples = [once.sample(number) for number in range(once.num_steps * 8)]
    assert sum(float(sample["importance"]) for sample in samples) == 21
    assert once.sample(24)["ids"].shape == once.sample(0)["ids"].shape, "the loader reads ahead"


def test_balanced_classes_weigh_alike(bpe: Tokenizer) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    made = batches(bpe)
    targets = np.array([int(example.target) for example in made.examples])
    assert made.weights == pytest.approx(compute_class_weight("balanced", classes=np.array([0, 1]), y=targets).tolist())
    importance = [float(made.arrays(number, 48)["importance"]) for number in range(len(targets))]
    assert sum(w for w, t in zip(importance, targets, strict=True) if t) == pytest.approx(len(targets) / 2)
