"""Reading text: every kind of file gives the same documents, wherever it is cut, and broken lines are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from megalite.data.documents import BadLine, Document, documents
from megalite.data.encode import SLICE, slices, split_sentences
from megalite.data.inputs import Reading, cut, find_files
from megalite.errors import UserError

SMALL = Reading(piece=10_000)


def read(path: Path | str, reading: Reading = SMALL) -> list[str]:
    found = [d for piece in cut(find_files([str(path)]), reading) for d in documents(piece, reading)]
    assert all(isinstance(d, Document) for d in found), found
    return [d.text for d in found if isinstance(d, Document)]


def bad(path: Path | str, reading: Reading = SMALL) -> list[str]:
    found = [d for piece in cut(find_files([str(path)]), reading) for d in documents(piece, reading)]
    return [f"{d.where}: {d.why}" for d in found if isinstance(d, BadLine)]


def test_every_kind_of_file_gives_the_same_documents(corpus, texts, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = corpus.read_bytes()
    half = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), tmp_path / "c.parquet", row_group_size=100)
    assert read(corpus) == texts
    assert len(list(cut([corpus], SMALL))) > 100
    for file in sorted(tmp_path.iterdir()):
        assert read(file) == texts, file


def test_a_line_that_begins_where_a_piece_ends_is_read_once(tmp_path):
    lines = [f'{{"text": "{i:03}"}}\n' for i in range(200)]
    (tmp_path / "even.jsonl").write_text("".join(lines))
    for size in (len(lines[0]) * 10, len(lines[0]) * 10 + 1, len(lines[0]) * 10 - 1):
        assert read(tmp_path / "even.jsonl", Reading(piece=size)) == [f"{i:03}" for i in range(200)]


def test_rows_of_a_large_row_group_are_read_in_pieces(texts, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("megalite.data.inputs.GROUP", 100_000)
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    assert len(list(cut([tmp_path / "c.parquet"], SMALL))) > 5
    assert read(tmp_path / "c.parquet") == texts


def test_a_hugging_face_data_set_is_streamed(texts, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:50]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[50:60]))
    assert read(f"hf:{tmp_path}") == texts[:50]
    assert read(f"hf:{tmp_path}:test") == texts[50:60]
    with pytest.raises(UserError, match=r"nowhere::train cannot be read .*check name, config and split"):
        read(f"hf:{tmp_path}/nowhere::train")


def test_a_long_text_file_comes_back_whole_from_its_pieces(texts, tmp_path):
    text = "\ufeff" + "".join(texts) + "é" * 30_000 + "no break"
    (tmp_path / "long.txt").write_text(text, "utf-8", newline="")
    pieces = list(cut([tmp_path / "long.txt"], SMALL))
    found = [d for piece in pieces for d in documents(piece, SMALL)]
    assert len(found) > 50
    assert "".join(d.text for d in found if isinstance(d, Document)) == text[1:]
    assert [d.first for d in found] == [True] + [False] * (len(found) - 1)
    assert [d.last for d in found] == [False] * (len(found) - 1) + [True]
    assert len({d.head for d in found}) == 1


@pytest.mark.parametrize(("separator", "joint"), [("line", "\n"), ("blank-line", "\n\n")])
def test_a_text_file_may_hold_a_document_a_line_or_between_blank_lines(tmp_path, separator, joint):
    wanted = [f"document {i} " + "x" * (i % 97) for i in range(3000)]
    (tmp_path / "many.txt").write_text(joint.join(wanted))
    reading = Reading(documents=separator, piece=5000)
    assert [t.strip() for t in read(tmp_path / "many.txt", reading)] == [t.strip() for t in wanted]


def test_small_text_files_are_one_document_each_and_read_together(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}\n\nof two paragraphs")
    assert read(tmp_path) == [f"file {i}\n\nof two paragraphs" for i in range(50)]
    assert len(list(cut(find_files([str(tmp_path)]), SMALL))) == 1


def test_broken_lines_are_named_by_file_and_line(tmp_path):
    good = json.dumps({"text": "fine " * 30}).encode()
    broken = {
        41: (b'{"text": "cut off', "no JSON"),
        100: (b'{"text": "\xff"}', r"no UTF-8 (byte 0xff)"),
        101: (b'["text"]', "no JSON object"),
        150: (b'{"body": "x", "id": 3}', 'no "text" (it has body, id; --text-key)'),
        199: (b'{"text": 7}', '"text" is int, no text'),
        200: (b'{"text": "\\ud800"}', "half a surrogate pair"),
    }
    lines = [broken.get(n, (good,))[0] for n in range(1, 201)]
    lines[20] = b""  # an empty line is none, but it counts
    data = b"\n".join(lines) + b"\n"
    (tmp_path / "plain.jsonl").write_bytes(data)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        found = bad(tmp_path / name)
        assert len(found) == len(broken)
        for report, (number, (_, why)) in zip(found, broken.items(), strict=True):
            assert report.startswith(f"{tmp_path / name}:{number}: ")
            assert why in report


def test_text_that_is_no_utf8_is_named_by_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"eins\nzwei\n" + "drei für\n".encode("latin-1") * 3)
    assert bad(tmp_path / "latin.txt") == [f"{tmp_path}/latin.txt:3: no UTF-8 (byte 0xfc)"]
    (tmp_path / "long.txt").write_bytes(b"line\n" * 5000 + b"\xfc\n" + b"line\n" * 5000)
    assert bad(tmp_path / "long.txt") == [f"{tmp_path}/long.txt:5001: no UTF-8 (byte 0xfc)"]


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst"])
def test_compressed_files_that_were_cut_short_are_refused(corpus, tmp_path, name):
    data = corpus.read_bytes()
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    (tmp_path / name).write_bytes(packed[:-100])
    with pytest.raises(
        UserError, match=rf"{name} ends in the middle of its compressed data after {len(packed) - 100} bytes; copy it again"
    ):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(packed[:1000] + b"damage" + packed[1006:])
    with pytest.raises(UserError, match=rf"{name} (is damaged|ends in the middle)"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (None, "nothing.txt", "nothing.txt does not exist; give files, folders, hf:NAME"),
        ("file", "table.csv", "table.csv is of no known kind .*rename or convert it"),
        ("folder", "empty", "empty holds no file ending in .txt .jsonl"),
        ("file", "no.parquet", "no.parquet is no parquet file"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(tmp_path, make, name, message):
    if make == "file":
        (tmp_path / name).write_text("x")
    elif make == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r'no text column "text" \(it has body, id\); pass --text-key'):
        read(tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", Reading(text_key="body")) == ["x"]


def test_stdlib_is_the_source_of_python_without_tests():
    found = find_files(["stdlib"])
    assert 500 < len(found) < 2000
    assert not [f for f in found if "/test/" in str(f) or "site-packages" in str(f)]
    assert any(str(f).endswith("/json/decoder.py") for f in found)


@pytest.mark.parametrize(
    "line", ["def function(x):\n    return x + 1  # because of that\n\n", '"AuthorizationContext":"arn:MediaConnectCreate",\n']
)
def test_slices_cut_no_token_apart(trained, line):
    text = line * (2 * SLICE // 50)
    parts = list(slices(text))
    assert len(parts) > 1
    assert "".join(parts) == text
    assert max(map(len, parts)) <= SLICE
    for kind in ("train:bpe", "train:wordpiece"):
        whole = trained[kind].encode_batch([text])[0].tolist()
        assert [i for ids in trained[kind].encode_batch(parts) for i in ids] == whole


def test_sentences_end_at_full_stops_and_at_line_ends():
    text = "Dr. Smith has $3.50, e.g. in coins. Does he?\nYes!  He said so.\n\n   x = a.b\n"
    assert list(split_sentences(text)) == ["Dr. Smith has $3.50, e.g. in coins.", "Does he?", "Yes!", "He said so.", "x = a.b"]
