"""New tokenizers: byte-level BPE (Sennrich et al. 2016), WordPiece (Schuster and Nakajima 2012), Unigram (Kudo 2018).

In: texts and a size. Out: a `Tokenizer`; the same texts give the same one, byte for byte.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

from megalite.data.tokenizer import HuggingFace, SentencePiece, Tokenizer
from megalite.errors import UserError

TRAINED = ("train:bpe", "train:wordpiece", "train:unigram")


def train_tokenizer(kind: str, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A new tokenizer of this kind, with at most `vocab_size` entries. Raises UserError where that is too few."""
    return {"train:bpe": _train_bpe, "train:wordpiece": _train_wordpiece, "train:unigram": _train_unigram}[kind](texts, vocab_size)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """GPT-2's: 256 bytes, so every text can be written and read back exactly."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UserError(
            f"--vocab-size {vocab_size} is below the 256 bytes and <|endoftext|> of byte-level BPE; choose {len(alphabet) + 1} or more"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False, max_token_length=32
    )
    fast.train_from_iterator(texts, trainer)
    return HuggingFace(fast, {"eos": "<|endoftext|>"})


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's, cased: source code and names mean different things in lower case.

    The trainer numbers "##c" in the order of a hash table, another in every process, and breaks ties by number. Named as special
    tokens they are numbered before it begins; the tokenizer is then built from the vocabulary without that trick.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    def build(vocabulary: dict[str, int]) -> Fast:
        fast = Fast(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        fast.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        fast.decoder = decoders.WordPiece()
        return fast

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    sample = list(texts)
    counts: Counter[str] = Counter()
    for text in sample:
        counts.update(text)
    common = sorted((c for c in counts if c.isprintable() and c != " "), key=lambda c: (-counts[c], c))
    letters = sorted(common[: min(1000, vocab_size // 4)])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=letters, limit_alphabet=len(letters),
        special_tokens=[*special.values(), *(f"##{c}" for c in letters)],
    )  # fmt: skip
    fast = build({})
    fast.train_from_iterator(sample, trainer)
    return HuggingFace(build(fast.get_vocab(with_added_tokens=True)), special)


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """SentencePiece's, with bytes for what the pieces cannot write; spaces and line ends are kept.

    (The trainer of `tokenizers` gave another vocabulary on every run.)
    """
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line and len(line) < 4096)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="unigram", vocab_size=vocab_size, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
            split_digits=True, user_defined_symbols=["\n"], unk_id=0, bos_id=-1, eos_id=1, pad_id=-1, eos_piece="<|endoftext|>",
            num_threads=4, hard_vocab_limit=False, input_sentence_size=2_000_000, shuffle_input_sentence=False, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as problem:
        reason = str(problem).rpartition("] ")[2]  # without the place in its source
        raise UserError(
            f"--tokenizer train:unigram with --vocab-size {vocab_size} failed ({reason}); choose another size or more text"
        ) from None
    return SentencePiece(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), {"eos": "<|endoftext|>"})
