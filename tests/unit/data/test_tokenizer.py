"""Tokenizers of every source: text stays text, and the stored one is the same one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from megalite.data.tokenizer import open_tokenizer, stored_tokenizer
from megalite.data.vocabulary import TRAINED, train_tokenizer
from megalite.errors import UserError

SPELLED = "a<|endoftext|>b [MASK] [CLS] x [SEP] [PAD] [UNK] <unk> <s> </s> <pad> <mask> \uff1c/s\uff1e"


@pytest.fixture(params=[*TRAINED, "careless", "unigram file", "lookup file"])
def tokenizer(request, trained, tmp_path):
    if request.param in trained:
        return trained[request.param]
    if request.param == "careless":  # a tokenizer.json whose special tokens are ordinary entries, cut at spaces
        words = ["[UNK]", "[MASK]", "[CLS]", "[SEP]", "[PAD]", "</s>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz[]<>|/ABCDEFKLMNPSTU"]
        fast = Fast(
            models.WordPiece(
                {**{w: i for i, w in enumerate(words)}, **{f"##{w}": 90 + i for i, w in enumerate(words[7:])}}, unk_token="[UNK]"
            )
        )
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif request.param == "unigram file":  # special tokens are pieces the model itself may find in the text
        pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<mask>", 0.0), ("<pad>", 0.0), *((c, -5.0) for c in "▁abcdefghijklmnopqrstuvwxyz</>|[]")]
        fast = Fast(models.Unigram(pieces, unk_id=0))
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
    else:  # ignore_merges looks whole words up in the vocabulary, as Llama 3 does
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast = Fast(models.BPE({**{c: i for i, c in enumerate(letters)}, "<|endoftext|>": 256, "</s>": 257}, [], ignore_merges=True))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.save(str(tmp_path / "tokenizer.json"))
    return open_tokenizer(tmp_path / "tokenizer.json")


def test_the_spelling_of_a_special_token_stays_text(tokenizer):
    assert tokenizer.special
    for text in (SPELLED, *SPELLED.split(" "), *SPELLED.split(" ")[::-1]):
        ids, alone = tokenizer.encode_batch([text, "abc"])
        assert not {int(i) for i in ids} & {i for role, i in tokenizer.special.items() if role != "unk"}
        assert (tokenizer.encode_batch(["abc"])[0] == alone).all()


@pytest.mark.parametrize("kind", ["train:bpe", "train:unigram"])
def test_text_comes_back_exactly(trained, kind):
    for text in (SPELLED, "def f(x):\n    return  x\n\n\t# Ünïcödé 日本語 🙂\r\n"):
        assert trained[kind].decode(trained[kind].encode_batch([text])[0]) == text


@pytest.mark.parametrize("spelling", ["<unk>", "[UNK]"])
def test_the_spelling_of_unknown_is_read_as_letters(tokenizer, spelling):
    known = tokenizer.special.get("unk", -1) not in tokenizer.encode_batch([" ".join(spelling)])[0]
    assert not known or tokenizer.special.get("unk", -1) not in tokenizer.encode_batch([f"a {spelling} b"])[0]


def test_tokenizers_that_can_be_told_need_no_second_look(trained, monkeypatch):
    def second_look(_):
        raise AssertionError

    for kind in TRAINED:
        monkeypatch.setattr(trained[kind], "_encode_broken", second_look)
        trained[kind].encode_batch(["a <|endoftext|> b [MASK] c [SEP]"])


@pytest.mark.parametrize("kind", TRAINED)
def test_a_saved_tokenizer_is_the_same_one(trained, texts, kind, tmp_path):
    trained[kind].save(tmp_path / "again")
    again = open_tokenizer(tmp_path / "again")
    assert (again.fingerprint, again.special, again.vocab_size) == (
        trained[kind].fingerprint,
        trained[kind].special,
        trained[kind].vocab_size,
    )
    for ours, theirs in zip(trained[kind].encode_batch(texts[:30]), again.encode_batch(texts[:30]), strict=True):
        assert (ours == theirs).all()


@pytest.mark.parametrize("kind", TRAINED)
def test_training_twice_gives_the_same_tokenizer(texts, kind):
    first, second = (train_tokenizer(kind, texts[:20], vocab_size=500) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_fingerprints_tell_tokenizers_apart(trained, texts):
    others = [train_tokenizer("train:bpe", texts[:n], vocab_size=600) for n in (10, 60)]
    prints = [t.fingerprint for t in (*trained.values(), *others)]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_ignores_how_the_file_is_laid_out(trained, tmp_path):
    trained["train:wordpiece"].save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(tmp_path).fingerprint == trained["train:wordpiece"].fingerprint


def test_transformers_opens_the_stored_folder(bpe, trained):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe)
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs("def f(x): return x")["input_ids"] == trained["train:bpe"].encode_batch(["def f(x): return x"])[0].tolist()


def test_roles_come_from_the_configuration_first(trained, tmp_path):
    trained["train:wordpiece"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[SEP]"}}))
    assert open_tokenizer(tmp_path).special["eos"] == trained["train:wordpiece"].special["sep"]


def test_word_starts_follow_the_marks_of_the_vocabulary(trained):
    for kind, text, words in (
        ("train:wordpiece", "unbelievable things, self.foo", ["unbelievable", "things", ",", "self", ".", "foo"]),
        ("train:bpe", "unbelievable things, self.foo", ["unbelievable", " things", ",", " self", ".", "foo"]),
        ("train:unigram", "unbelievable things, self.foo", ["unbelievable", " things", ",", " self", ".", "foo"]),
    ):
        ids = trained[kind].encode_batch([text])[0]
        starts = trained[kind].word_starts(ids)
        found = np.split(ids, np.flatnonzero(starts)[1:])
        assert [trained[kind].decode(word).replace(" ##", "") for word in found] == words
        assert len(ids) > len(words)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", r"tokenizer nowhere/at/all does not exist; give a tokenizer.json, a .model"),
        ("missing.json", r"tokenizer missing.json does not exist"),
        ("broken.json", r"tokenizer .*broken.json cannot be read"),
        ("broken.model", r"tokenizer .*broken.model cannot be read"),
    ],
)
def test_a_source_that_is_no_tokenizer_is_refused(tmp_path, source, message):
    if source.startswith("broken"):
        source = str(tmp_path / source)
        (tmp_path / source).write_bytes(b"{nonsense")
    with pytest.raises(UserError, match=message):
        open_tokenizer(source)


@pytest.mark.parametrize("content", ["{broken", "[1]", '{"eos_token": 7}', '{"eos_token": {"id": 3}}'])
def test_a_broken_configuration_is_refused(bpe, tmp_path, content):
    shutil.copytree(bpe, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read .*; mend it, or give the tokenizer's own file"):
        open_tokenizer(tmp_path / "tokenizer")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder without tokenizer.json, tokenizer.model, spiece.model, and transformers opens it no"):
        open_tokenizer(tmp_path)


def test_byte_level_bpe_needs_room_for_the_bytes():
    with pytest.raises(UserError, match="--vocab-size 200 is below the 256 bytes"):
        train_tokenizer("train:bpe", ["abc"], vocab_size=200)


def test_shards_of_megatron_have_no_stored_tokenizer(tmp_path):
    assert stored_tokenizer(tmp_path / "megatron_text_document") is None
