"""`prepare` end to end: the same bytes whatever happens on the way, and one clear line for bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from megalite.data import prepare as module
from megalite.data.encode import Recipe, encode_part, split_of, split_sentences
from megalite.data.inputs import Piece, Reading, cut
from megalite.data.manifest import Manifest
from megalite.data.parts import work_folder
from megalite.data.prepare import Preparation, prepare
from megalite.data.shards import Shard
from megalite.data.tokenizer import open_tokenizer, stored_tokenizer
from megalite.errors import UserError

SHARES = (0.8, 0.1, 0.1)
RUN = """
import sys
from megalite.data.prepare import Preparation, prepare
if __name__ == "__main__":
    prepare(Preparation(inputs=(sys.argv[1],), output=sys.argv[2], tokenizer=sys.argv[3], workers=2, splits=(0.8, 0.1, 0.1)))
"""


def run(*inputs: object, output: Path, tokenizer: str, **settings) -> tuple[Manifest, str]:
    """The manifest, and what was printed."""
    said = io.StringIO()
    preparation = Preparation(
        inputs=tuple(map(str, inputs)), output=str(output), tokenizer=tokenizer, **{"workers": 1, "splits": SHARES, **settings}
    )
    return prepare(preparation, console=Console(file=said, soft_wrap=True)), said.getvalue()


def content(output: Path) -> dict[str, bytes]:
    """Every shard and tokenizer file of a preparation."""
    files = [*output.parent.glob(f"{output.name}.*.???"), *Path(f"{output}.tokenizer").iterdir()]
    return {file.name.removeprefix(output.name): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def once(corpus, bpe, tmp_path_factory) -> Path:
    """What an undisturbed run with one worker writes."""
    output = tmp_path_factory.mktemp("once") / "corpus"
    run(corpus, output=output, tokenizer=bpe)
    return output


def test_every_document_lies_in_its_split_and_ends_with_eos(once, texts):
    tokenizer = stored_tokenizer(once)
    assert tokenizer is not None
    wanted = [text for text in texts if text.strip()]
    for number, split in enumerate(("train", "valid", "test")):
        shard = Shard(f"{once}.{split}")
        mine = [text for text in wanted if split_of(text.encode()[: 1 << 16], SHARES, 0) == number]
        assert shard.num_documents == shard.num_sequences == len(mine) > 0
        for index, ids in enumerate(tokenizer.encode_batch(mine)):
            assert shard.sequence(index).tolist() == [*ids.tolist(), tokenizer.special["eos"]]
    assert not Path(f"{once}.parts").exists()


def test_splits_have_their_shares(texts):
    counts = np.bincount([split_of(f"document {i}".encode(), (0.9, 0.07, 0.03), 5) for i in range(20_000)])
    for count, share in zip(counts, (0.9, 0.07, 0.03), strict=True):
        assert abs(count - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5
    assert {split_of(f"{i}".encode(), (0.7, 0.3, 0.0), 0) for i in range(1000)} == {0, 1}


def test_any_number_of_workers_writes_the_same_bytes(corpus, bpe, once, tmp_path):
    run(corpus, output=tmp_path / "corpus", tokenizer=bpe, workers=2)
    assert content(tmp_path / "corpus") == content(once)


def test_a_killed_run_goes_on_to_the_same_bytes(corpus, bpe, once, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    output = tmp_path / "corpus"
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(corpus), str(output), bpe])
    parts = Path(f"{output}.parts")
    limit = time.monotonic() + 60
    while not list(parts.glob("*.part")) and time.monotonic() < limit:
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {file: file.stat().st_mtime_ns for file in parts.glob("*.part")}
    assert finished
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive their parent"
    with pytest.raises(UserError, match="was not finished; run the same `megalite prepare` again"):
        Shard(f"{output}.train")
    _, said = run(corpus, output=output, tokenizer=bpe)
    assert "pieces from an earlier run" in said
    assert content(output) == content(once)


def test_a_run_that_dies_while_it_names_its_files_is_not_taken_for_whole(corpus, bpe, once, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    output = tmp_path / "corpus"
    run(corpus, output=output, tokenizer=bpe, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(module.Manifest, "save", die)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, output=output, tokenizer=bpe)
    assert Path(f"{output}.train.idx").exists()
    with pytest.raises(UserError, match="was not finished"):
        Shard(f"{output}.train")
    _, said = run(corpus, output=output, tokenizer=bpe)
    assert "took over" in said
    assert content(output) == content(once)


def _die_at(moment: int) -> None:
    """Kill this process by SIGKILL at so many a sync, rename or removal of a file."""
    left = iter(range(moment - 1))

    def before(plain: Any) -> Any:
        def called(*arguments: Any, **settings: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **settings)

        return called

    os.fsync = before(os.fsync)
    for name in ("replace", "rename", "unlink"):
        setattr(Path, name, before(getattr(Path, name)))


def test_killed_at_any_moment_of_writing_the_shards_they_are_whole_or_said_to_be_unfinished(corpus, bpe, once, tmp_path):
    """Over older shards of another seed: their index, the new one, the tokenizer and the manifest change places one after the other."""
    output, moment, killed = tmp_path / "corpus", 0, True
    run(corpus, output=output, tokenizer=bpe, seed=1)
    before = content(output)
    while killed:
        moment += 1
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                _die_at(moment)
                run(corpus, output=output, tokenizer=bpe)
                os._exit(0)
            os._exit(1)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        try:
            Shard(f"{output}.train")
            named = {name: data for name, data in content(output).items() if not name.endswith(".tmp")}
            manifest = Manifest.find(str(output))
            assert named == (before if manifest and manifest.settings["seed"] == 1 else content(once))
        except UserError as error:
            assert killed and "was not finished; run the same `megalite prepare` again" in str(error)
    assert moment > 15
    assert content(output) == content(once)


def test_a_second_run_finds_its_work_done(corpus, bpe, once):
    before = {file: file.stat().st_mtime_ns for file in once.parent.iterdir()}
    _, said = run(corpus, output=once, tokenizer=bpe, workers=2)
    assert "is prepared already" in said
    assert {file: file.stat().st_mtime_ns for file in once.parent.iterdir()} == before


def test_changed_input_or_settings_or_a_lost_file_are_prepared_again(texts, bpe, tmp_path):
    source, output = tmp_path / "few.jsonl", tmp_path / "out" / "few"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:60]))
    run(source, output=output, tokenizer=bpe)
    first = content(output)
    Path(f"{output}.valid.bin").write_bytes(b"")
    _, said = run(source, output=output, tokenizer=bpe)
    assert "nothing to do" not in said
    assert content(output) == first
    run(source, output=output, tokenizer=bpe, seed=3, splits=(0.5, 0.5, 0.0))
    assert content(output) != first
    assert not Path(f"{output}.test.bin").exists()
    source.write_text(source.read_text() + json.dumps({"text": "one more"}) + "\n")
    manifest, _ = run(source, output=output, tokenizer=bpe, seed=3, splits=(0.5, 0.5, 0.0))
    assert sum(c["documents"] for c in manifest.counts.values()) == 61 - texts[:60].count("")


def test_bert_shards_hold_sentences(corpus, texts, wordpiece, tmp_path):
    manifest, _ = run(corpus, output=tmp_path / "bert", tokenizer=wordpiece, splits=(1.0, 0.0, 0.0))
    tokenizer, shard = open_tokenizer(wordpiece), Shard(tmp_path / "bert.train")
    assert manifest.sentences
    odd = texts.index("One sentence. Dr. Smith wrote another one! Did he?\n\nA new paragraph, e.g. this one. And its end.")
    at = odd - texts[:odd].count("")
    sentences = list(split_sentences(texts[odd]))
    assert len(sentences) == 5
    assert len(shard.document(at)) == 5
    for sequence, ids in zip(shard.document(at), tokenizer.encode_batch(sentences), strict=True):
        assert shard.sequence(sequence).tolist() == ids.tolist()
    assert shard.num_documents == len([t for t in texts if t.strip()])


@pytest.mark.parametrize("sentences", [False, True])
def test_a_document_in_several_pieces_is_one_document(texts, bpe, tmp_path, sentences):
    path = tmp_path / "long.txt"
    text = "".join(texts[:40])
    path.write_text(text, "utf-8", newline="")
    tokenizer = open_tokenizer(bpe)
    recipe = Recipe(Reading(piece=10_000), sentences, (1.0, 0.0, 0.0), 0, bpe, tokenizer.fingerprint)
    parts = [encode_part(piece, recipe, tokenizer) for piece in cut([path], recipe.reading)]
    assert len(parts) > 5
    assert [len(part["train_ends"]) for part in parts] == [0] * (len(parts) - 1) + [1]
    together = np.concatenate([part["train_tokens"] for part in parts]).tolist()
    if sentences:
        assert len(parts[0]["train_lengths"]) > 10
    else:
        assert together == [*tokenizer.encode_batch([text])[0].tolist(), tokenizer.special["eos"]]


def test_broken_lines_are_refused_or_skipped_by_choice(texts, bpe, tmp_path):
    lines = [json.dumps({"text": t}) for t in texts[:30]]
    lines[7], lines[19] = '{"text": "cut', '{"other": 1}'
    source = tmp_path / "broken.jsonl"
    source.write_text("\n".join(lines))
    message = r"broken.jsonl:8: no JSON \(.*\) \(and 1 more broken lines there\); mend it, or leave such lines out with --bad-lines skip"
    with pytest.raises(UserError, match=message):
        run(source, output=tmp_path / "out", tokenizer=bpe)
    assert not Path(f"{tmp_path}/out.train.idx").exists()
    manifest, said = run(source, output=tmp_path / "out", tokenizer=bpe, bad_lines="skip")
    assert manifest.bad_lines == 2
    assert "2 broken lines skipped" in said
    assert "broken.jsonl:8: no JSON" in said
    assert 'broken.jsonl:20: no "text" (it has other; --text-key)' in said
    assert sum(c["documents"] for c in manifest.counts.values()) == 28 - texts[:30].count("")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": (0.9, 0.2, 0.1)}, r"--splits 0.9,0.2,0.1 sum to 1.2, shares must sum to 1; for instance 0.98,0.01,0.01"),
        ({"splits": (0.0, 0.5, 0.5)}, r"--splits gives 0 to training"),
        ({"tokenizer": "train:char"}, r"--tokenizer train:char is not one of train:bpe, train:wordpiece, train:unigram"),
        ({"vocab_size": 500}, r"--vocab-size 500 is for a tokenizer trained here"),
        ({"tokenizer": "train:bpe", "vocab_size": 3}, r"--vocab-size 3 is too small"),
        ({"workers": 0}, r"--workers 0 is not from 1 to 1024; leave it out for one a core"),
        ({"workers": 10**6}, r"--workers 1000000 is not from 1 to 1024"),
        ({"tokenizer": "train:bpe", "vocab_size": 10**11}, r"--vocab-size 100000000000 is too large, 16 to 1048576 can be trained"),
        ({"splits": (float("nan"), 0.5, 0.5)}, r"--splits nan,0.5,0.5: a share is from 0 to 1"),
        ({"splits": (0.5, 0.6, -0.1)}, r"--splits 0.5,0.6,-0.1: a share is from 0 to 1"),
        ({"output": "data/"}, r"--output 'data/' names no file; give the beginning of what is written, such as data/corpus"),
        ({"output": ""}, r"--output '' names no file"),
        ({"tokenizer": " "}, r"--tokenizer ' ' names none; give a file"),
        ({"inputs": ("hf:",)}, r"input hf: names no data set"),
        ({"inputs": ()}, r"got no input; name files, folders"),
        ({"text_key": "body"}, r'tiny.jsonl:1: no "text"|tiny.jsonl:1: no "body" \(it has text; --text-key\)'),
    ],
)
def test_settings_that_make_no_sense_are_refused(bpe, tmp_path, settings, message):
    (tmp_path / "tiny.jsonl").write_text('{"text": "tiny"}\n')
    preparation = {"inputs": (str(tmp_path / "tiny.jsonl"),), "output": str(tmp_path / "out"), "tokenizer": bpe, "workers": 1, **settings}
    with pytest.raises(UserError, match=message):
        prepare(Preparation(**preparation), console=Console(file=io.StringIO()))


REFUSALS = {
    "a broken line": ({}, ['{"text": "cut'], "no JSON"),
    "a broken line while training": ({"tokenizer": "train:bpe"}, ['{"text": "cut'], "no JSON"),
    "no text": ({}, [], "no text in"),
    "no text to train on": ({"tokenizer": "train:unigram"}, ['{"text": " "}'], "no text to train a tokenizer on in"),
    "no text for training": ({"splits": (1e-9, 1 - 1e-9, 0.0)}, ['{"text": "x"}'], "the training split is empty"),
    "no such field": ({"text_key": "body"}, ['{"text": "x"}'], 'no "body"'),
    "no such tokenizer": ({"tokenizer": "./nowhere.json"}, ['{"text": "x"}'], "does not exist"),
    "no end of text": ({"tokenizer": "wordpiece", "split_sentences": False}, ['{"text": "x"}'], "has no end-of-text token"),
    "too small a vocabulary": ({"tokenizer": "train:bpe", "vocab_size": 100}, ['{"text": "x"}'], "is below the 256 bytes"),
    "too small a vocabulary for its letters": (
        {"tokenizer": "train:unigram", "vocab_size": 20},
        ['{"text": "x"}'],
        "is smaller than",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_leaves_nothing(bpe, wordpiece, tmp_path, name):
    settings, lines, message = REFUSALS[name]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    settings = {"tokenizer": bpe, **settings}
    settings["tokenizer"] = wordpiece if settings["tokenizer"] == "wordpiece" else settings["tokenizer"]
    with pytest.raises(UserError, match=message) as refused:
        run(source, output=tmp_path / "new" / "folder" / "out", **settings)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_refusal_leaves_what_was_there_before(corpus, bpe, tmp_path, monkeypatch):
    run(corpus, output=tmp_path / "out", tokenizer=bpe)
    before = content(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError):
        run(tmp_path / "bad.jsonl", output=tmp_path / "out", tokenizer=bpe)
    assert content(tmp_path / "out") == before
    assert "nothing to do" in run(corpus, output=tmp_path / "out", tokenizer=bpe)[1]
    with pytest.raises(OSError, match="no"), work_folder(str(tmp_path / "other")) as folder:
        (folder / "finished.part").touch()
        raise OSError("no")
    with pytest.raises(UserError):
        run(tmp_path / "bad.jsonl", output=tmp_path / "other", tokenizer=bpe)
    assert (tmp_path / "other.parts" / "finished.part").exists()


def test_long_work_outlives_a_refusal(texts, bpe, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]))
    (tmp_path / "b.jsonl").write_text("{")
    monkeypatch.setattr("megalite.data.parts.WORTH", 0.0)
    with pytest.raises(UserError, match="no JSON"):
        run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", output=tmp_path / "out", tokenizer=bpe)
    with pytest.raises(UserError, match=r"the preparation of .*out was not finished"):
        Shard(tmp_path / "out.train")
    _, said = run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", output=tmp_path / "out", tokenizer=bpe, bad_lines="skip")
    assert "took over 2 of 2 pieces from an earlier run" in said


def test_a_damaged_part_is_made_anew(corpus, bpe, once, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Manifest, "save", die)
        run(corpus, output=tmp_path / "corpus", tokenizer=bpe)
    parts = sorted((tmp_path / "corpus.parts").glob("*.part"))
    data = parts[0].read_bytes()
    parts[0].write_bytes(data[: len(data) // 2])
    at = len(data) // 4  # in the tokens
    parts[1].write_bytes(parts[1].read_bytes()[:at] + b"damage" + parts[1].read_bytes()[at + 6 :])
    with pytest.raises(UserError, match=rf"{parts[1].name} was damaged and is removed; run the same command again"):
        run(corpus, output=tmp_path / "corpus", tokenizer=bpe)
    run(corpus, output=tmp_path / "corpus", tokenizer=bpe)
    assert content(tmp_path / "corpus") == content(once)


def test_parts_that_a_kill_left_behind_finished_work_go(corpus, bpe, tmp_path):
    run(corpus, output=tmp_path / "out", tokenizer=bpe)
    (tmp_path / "out.parts").mkdir()
    assert "nothing to do" in run(corpus, output=tmp_path / "out", tokenizer=bpe)[1]
    assert not (tmp_path / "out.parts").exists()


def test_a_damaged_manifest_does_not_stand_in_the_way(corpus, bpe, once, tmp_path):
    run(corpus, output=tmp_path / "corpus", tokenizer=bpe)
    Manifest.path(tmp_path / "corpus").write_text("{")
    run(corpus, output=tmp_path / "corpus", tokenizer=bpe)
    assert content(tmp_path / "corpus") == content(once)


def test_a_full_disk_is_told_in_one_line_and_the_work_stays(texts, bpe, tmp_path):
    """No file may grow beyond 40 kB; a part fits, the shard of all does not."""
    source = tmp_path / "a.txt"
    source.write_text("".join(texts)[:60_000])
    line = f"{sys.executable} -m megalite prepare {source} --output {tmp_path}/out --tokenizer {bpe} --workers 1 --splits 1,0,0"
    for blocks, words in (("20", "File too large; see to that and run the same command again"), ("unlimited", "prepared")):
        done = subprocess.run(["bash", "-c", f"ulimit -f {blocks} && {line}"], capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert words in done.stdout + done.stderr
        assert done.returncode == (2 if blocks != "unlimited" else 0)
    assert not (tmp_path / "out.parts").exists()
    assert Shard(tmp_path / "out.train").num_documents == 1


def test_an_input_that_cannot_be_read_is_told_in_one_line(texts, bpe, tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "x"}')

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr("megalite.data.prepare.make_parts", refuse)
    with pytest.raises(UserError, match=r"a.jsonl: Permission denied; see to that and run the same command again"):
        run(source, output=tmp_path / "out", tokenizer=bpe)
    assert list(tmp_path.iterdir()) == [source]


def test_a_corpus_without_text_is_refused(bpe, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"text": "  "}\n\n')
    with pytest.raises(UserError, match=r"no text in .*none.jsonl: 0 documents in 1 files; check the inputs and --text-key"):
        run(tmp_path / "none.jsonl", output=tmp_path / "out", tokenizer=bpe)


def test_a_corpus_too_small_for_a_training_split_is_refused(bpe, tmp_path):
    for number in range(100):  # a document that falls to validation
        text = f"document {number}"
        if split_of(text.encode(), SHARES, 0) == 1:
            break
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(UserError, match=r"the training split is empty \(documents: train 0, valid 1, test 0\); give more documents"):
        run(tmp_path / "one.txt", output=tmp_path / "out", tokenizer=bpe)
    assert not list(tmp_path.glob("out.*.bin"))
    assert not list(tmp_path.glob("out.*.tmp"))


def test_gpt_needs_an_end_of_text_token(wordpiece, corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"has no end-of-text token to end a document with; pass --split-sentences \(BERT\) or another --tokenizer"
    ):
        run(corpus, output=tmp_path / "out", tokenizer=wordpiece, split_sentences=False)


def test_two_preparations_of_one_output_do_not_mix(corpus, bpe, tmp_path):
    with work_folder(str(tmp_path / "out")), pytest.raises(UserError, match="another `megalite prepare` is writing"):
        run(corpus, output=tmp_path / "out", tokenizer=bpe)


def test_an_output_that_cannot_be_written_is_refused(corpus, bpe):
    with pytest.raises(UserError, match=r"--output /proc/nowhere/out cannot be written"):
        run(corpus, output=Path("/proc/nowhere/out"), tokenizer=bpe)


def test_a_new_tokenizer_is_trained_and_stored(corpus, tmp_path):
    manifest, said = run(corpus, output=tmp_path / "new", tokenizer="train:bpe", vocab_size=600)
    stored = stored_tokenizer(f"{tmp_path}/new.valid")
    assert stored is not None
    assert (stored.vocab_size, stored.fingerprint) == (600, manifest.tokenizer)
    assert "trained a bpe tokenizer with 600 entries" in said


def test_a_tokenizer_that_was_swapped_is_refused(corpus, bpe, wordpiece, tmp_path):
    run(corpus, output=tmp_path / "swap", tokenizer=bpe)
    for file in Path(wordpiece).iterdir():
        (tmp_path / "swap.tokenizer" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"swap.tokenizer has fingerprint \w+, .* was made with \w+; put the old folder back"):
        stored_tokenizer(tmp_path / "swap.train")
    shutil.rmtree(tmp_path / "swap.tokenizer")
    with pytest.raises(UserError, match=r"swap.tokenizer is missing beside its shards; copy it there too"):
        stored_tokenizer(tmp_path / "swap.train")


def test_the_key_of_a_piece_changes_with_what_it_stands_for():
    base = Piece("lines", ("a.jsonl",), "10 20", 0, 5)
    others = [
        Piece("lines", ("a.jsonl",), "10 21", 0, 5),
        Piece("lines", ("a.jsonl",), "10 20", 5, 9),
        Piece("lines", ("b.jsonl",), "10 20", 0, 5),
    ]
    assert len({p.key for p in (base, *others)}) == 4
