"""The quick way to encode gives, for every text, the ids that the tokenizer itself gives."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
import sys
import unicodedata
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from megalite.data import cuts, merges, words
from megalite.data.tokenizer import HuggingFace

SPOKEN = [  # the Universal Declaration of Human Rights, article 1 and its title; no translation is anyone's
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。世界人权宣言",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。世界人権宣言",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 세계 인권 선언",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם. მარადიული ადამიანი ইন্টারনেট มนุษย์ทั้งหลาย",
]
ODD = [
    *"  \t\r\n\n\v\f'’sdtmlrveSDTMLRVE_09½²ª٣四，。、！？「」…——“”·#()[]{}<>\u017f\u212a",
    *"\x1c\x1f\x85\xa0\u1680\u2000\u2009\u2028\u202f\u3000",  # white space, to some
    *"\u200b\u200d\ufeff\ufffd\0\x7f\u0301\u0323\u0345\u09be\u102e\u1161\u11a8가각\u0958\u037e\u0387\u1fef\u226e\u2126Åé",
    *("'ll", "'Re", "’s", "<think>", "<|endoftext|>", "[MASK]", "e\u0301", "🙂", "👩\u200d🚀", "🇨🇳", "\n\n", " \n", "\n ", "\t\t"),
    *"ａ１，\ue000\U000e0041\U0010ffff\u0378\U00016ebb\U00016d67\U000105d2\U0001f9cc\U0002a700\u9fff\u1c89",  # not assigned, or not long
]
PIECES = st.lists(st.one_of(st.sampled_from(ODD), st.sampled_from("".join(SPOKEN)), st.characters(exclude_categories=["Cs"])), max_size=40)
TEXTS = st.lists(PIECES.map("".join), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def byte_level(texts) -> Fast:
    """A vocabulary with words of every script, and entries that begin and end inside characters."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = split_by(cuts.LLAMA3)  # which has the longest words: a mark and letters, marks and line ends
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    alone = ["\n".join(text) for text in SPOKEN[:2]] * 200  # so that most of their characters become one token first
    pairs = ["".join(pair) for pair in product("自由平等，。\u3000", repeat=2)] * 50
    fast.train_from_iterator([*alone, *pairs, *SPOKEN * 20, *["\u2002 \n\n", "\u2002\n", "x.\n", "。\n"] * 200, *texts[:30]], trainer)
    return fast


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def quick(kind: str, byte_level: Fast, trained: dict) -> HuggingFace:
    """A tokenizer of this kind that has a quick way."""
    if kind.startswith("bert"):
        fast = Fast.from_str(trained["train:wordpiece"]._content().decode())
        fast.normalizer = normalizers.BertNormalizer(lowercase="uncased" in kind, strip_accents=None)
        return HuggingFace(fast, {"unk": "[UNK]", "mask": "[MASK]"})
    fast = Fast.from_str(byte_level.to_str())
    fast.add_tokens([AddedToken("<think>", normalized=False)])
    if "gpt2" in kind:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif "qwen" in kind:
        fast.pre_tokenizer = split_by(cuts.QWEN2)
    if "qwen" in kind or "nfc" in kind:
        fast.normalizer = normalizers.NFC()
    fast.model.ignore_merges = "llama" in kind
    return HuggingFace(fast, {"eos": "<|endoftext|>"})


KINDS = ["gpt2", "gpt2 nfc", "llama3", "qwen2", "bert cased", "bert uncased"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, byte_level, trained) -> HuggingFace:
    return quick(request.param, byte_level, trained)


def check(tokenizer: HuggingFace, texts: list[str]) -> None:
    assert tokenizer._words is not None
    flat, lengths = tokenizer._words.encode(texts)
    found = [ids.tolist() for ids in np.split(flat, np.cumsum(lengths)[:-1])]
    assert found == tokenizer._encode(texts)


@settings(max_examples=400, deadline=None)
@given(texts=TEXTS)
@example(texts=["", "\n", "", "x\n\n", "\n\ny", " ", " z"])
@example(texts=["<think>", "a<think>b", "\n<think>"])
@example(
    texts=[
        "\U00018cd6  人",
        "U\u2000\nx",
        "U\u2000 人",
        "\u2000  人",
        "\u2001 人",
        "e\u0301人",
        "人\u0301",
        ".\n\n  x",
        "。，今天",
        "，今",
        "'s今",
        "'ll今l",
        "今'll",
    ]
)
def test_any_text_has_the_ids_that_the_tokenizer_gives(tokenizer, texts):
    check(tokenizer, texts)


def test_real_text_of_many_scripts_has_the_ids_that_the_tokenizer_gives(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(words, "MEMORY", 20_000)  # forget often
    for batch in (texts[:60], SPOKEN, ["".join(SPOKEN), "", *SPOKEN], ["\n".join(SPOKEN), "  \n\t".join(SPOKEN)], list("".join(SPOKEN))):
        check(tokenizer, batch)


def test_text_is_encoded_in_groups_of_neighbours(tokenizer, texts, monkeypatch):
    batch = ["", *texts[:10], "", *SPOKEN, texts[11] * 3, ""]
    flat, lengths = tokenizer.encode_flat(batch)
    monkeypatch.setattr(words, "GROUP", 3000)
    assert len(list(words.groups(batch))) > 5
    again = tokenizer.encode_flat(batch)
    assert (again[0] == flat).all()
    assert (again[1] == lengths).all()
    assert max(sum(map(len, group)) for group in words.groups(batch)) < 3000 + 15_000
    assert [len(part) for part in tokenizer.encode_flat([])] == [0, 0]


def test_every_character_has_the_ids_that_the_tokenizer_gives_between_any_neighbours(tokenizer):
    """Of every code point, also those that Python and the tokenizer know from different versions of Unicode."""
    codes = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000 and (code < 0x3100 or code % 61 == 0)]
    for around in ("{0}", "a{0}b", " {0}\n {0}{0}", "人{0}，{0}的", ".{0}1{0}'{0}", "e{0}\u0301"):
        check(tokenizer, [around.format(chr(code)) for code in codes[:: 1 if around == "{0}" else 3]])


def test_much_is_cut_and_merged_without_the_tokenizer(byte_level, trained, monkeypatch):
    tokenizer = quick("gpt2", byte_level, trained)
    asked: list[str] = []
    monkeypatch.setattr(tokenizer._words, "_encode", lambda parts: (asked.extend(parts), tokenizer._encode_parts(parts))[1])
    text = "自由平等，自由。\n自由，。平等"
    check(tokenizer, [text, text])
    assert asked == []
    assert len(tokenizer._encode([text])[0]) < len(text)
    check(tokenizer, [SPOKEN[2] + " " + SPOKEN[2]])
    assert len(asked) == len(set(asked)) > 10
    assert set(asked) <= {"Все", *(f" {word}" for word in SPOKEN[2].replace(".", "").split())}


def test_entries_that_merges_do_not_make_are_words_of_their_own_only_as_a_whole(byte_level):
    """`ignore_merges` takes a whole word from the vocabulary; cut out of a longer word, the same characters merge."""
    fast = Fast.from_str(byte_level.to_str())
    letters = {chr(byte): chr(letter) for letter, byte in ((k, ord(v)) for k, v in merges._byte_of_letter().items())}
    state = json.loads(fast.to_str())
    for piece in ("尊由", "等", "龘", "自由平", " 律人"):
        spelled = "".join(letters[chr(byte)] for byte in piece.encode())
        state["model"]["vocab"].setdefault(spelled, len(state["model"]["vocab"]))
    state["model"]["ignore_merges"] = True
    tokenizer = HuggingFace(Fast.from_str(json.dumps(state)), {"eos": "<|endoftext|>"})
    alphabet = ["尊", "由", "等", "龘", "自", "平", "律", "人", "，", " ", "。"]
    check(tokenizer, ["".join(parts) for length in (1, 2, 3, 4) for parts in product(alphabet, repeat=length)])


def test_characters_that_nfc_joins_are_never_cut_from_the_one_before():
    seconds = cuts._seconds()
    for code in range(sys.maxunicode + 1):
        pair = unicodedata.normalize("NFD", chr(code))
        if len(pair) > 1 and unicodedata.is_normalized("NFC", chr(code)) and not 0xD800 <= code < 0xE000:
            assert not any(cuts._stands_alone(character, seconds) for character in pair[1:]), hex(code)


def test_merges_out_of_order_are_left_to_the_tokenizer(byte_level):
    """A merge of two characters that ranks before those that make them: the bytes merge in another order then."""
    state = json.loads(byte_level.to_str())
    written = state["model"]["merges"]
    at = next(i for i, (left, right) in enumerate(map(tuple, written)) if merges._word(left, right, merges._byte_of_letter()))
    written.insert(0, written.pop(at))
    fast = Fast.from_str(json.dumps(state))
    joins, found = merges.read_model(fast) or (None, None)
    assert joins is not None
    assert found is None
    check(HuggingFace(fast, {}), [*SPOKEN, "自由平等，自由。\n自由，。平等"])


def test_a_vocabulary_of_too_many_characters_is_cut_between_words_only(byte_level, monkeypatch):
    monkeypatch.setattr(merges, "KEYS", 10)
    assert merges.read_model(byte_level) is None
    check(HuggingFace(byte_level, {}), SPOKEN)


@pytest.mark.parametrize("change", ["prefix", "lower", "dropout", "pattern", "added", "short", "bert normalizer"])
def test_tokenizers_that_split_in_other_ways_go_their_own_way(byte_level, trained, change):
    fast = quick("bert cased" if "bert" in change else "qwen2", byte_level, trained)._backend
    if change == "prefix":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "lower":
        fast.normalizer = normalizers.Lowercase()
    elif change == "dropout":
        fast.model.dropout = 0.1
    elif change == "pattern":
        fast.pre_tokenizer = split_by(r"\p{N}{2}|\P{N}+")
    elif change == "added":
        fast.add_tokens([AddedToken("<sum>", normalized=True)])
    elif change == "short":
        fast.add_tokens([AddedToken("人", normalized=False)])
    else:
        fast.normalizer = normalizers.NFD()
    tokenizer = HuggingFace(fast, {})
    assert tokenizer._words is None
    assert tokenizer.encode_flat(["人人 a 12 <sum>"])[0].size
