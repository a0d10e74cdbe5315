"""Text to token ids and back: the one door to transformers' AutoTokenizer.

In: a tokenizer.json, a folder, a SentencePiece .model or a Hugging Face name (new ones come from `vocabulary.py`). Out: a `Tokenizer`.
Text is data: "<|endoftext|>" or "[MASK]" spelled out in a document never becomes that token, whichever source the tokenizer has.
Saved, it is a folder that transformers opens as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalite.data.cuts import cuts_of
from megalite.data.manifest import Manifest, output_of, write_atomically
from megalite.data.words import Words, groups
from megalite.errors import UserError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

ROLES = {  # spellings tried where no tokenizer_config.json says which token does what
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "unk": ("[UNK]", "<unk>"),
}
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # what a tokenizer's folder may hold
PROBE = "Probe 0123  two spaces\n\tTab, Ünïcödé ＡＢ 日本語 don't CamelCase_snake-case 1e-5 🙂 \u00a0end"  # noqa: RUF001


class Tokenizer:
    """What both libraries have in common; `special` maps a role (eos, pad, mask, ...) to its id."""

    file = ""
    """Name of the tokenizer's own file inside its folder."""

    def __init__(self, pieces: Sequence[str], special: dict[str, int], control: Iterable[int]) -> None:
        self.special, self.vocab_size = special, len(pieces)
        unknown = special.get("unk")
        forbidden = (set(special.values()) | set(control)) - {unknown}  # ids that text must never yield
        self.reserved = np.zeros(len(pieces), bool)
        self.reserved[sorted(forbidden)] = True
        spelled = sorted((pieces[i] for i in forbidden | ({unknown} if unknown is not None else set())), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self._unknown = pieces[unknown] if unknown is not None else "\0" * 8
        self._pieces = pieces
        self._starts: tuple[np.ndarray, np.ndarray] | None = None

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids in a row, and how many each text has: for text by the MB."""
        flats, lengths = zip(*(self._without_special(group, *self._encode_flat(group)) for group in groups(texts)), strict=True)
        return np.concatenate(flats), np.concatenate(lengths)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids a text, without any special token."""
        flat, lengths = self._without_special(texts, *_flat(self._encode(texts)))
        return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []

    def _without_special(self, texts: Sequence[str], flat: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.reserved[flat].any() or any(self._unknown in text for text in texts):
            batch = np.split(flat, np.cumsum(lengths)[:-1])
            return _flat([self._encode_broken(text) if self._spelled.search(text) or self.reserved[ids].any() else ids
                          for text, ids in zip(texts, batch, strict=True)])  # fmt: skip
        return flat, lengths

    def _encode_broken(self, text: str) -> list[int]:
        """Encode a text that spells a special token: cut after the spelling's first character, so that it cannot match."""
        cuts = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)]
        parts = self._encode([text[a:b] for a, b in pairwise(cuts)])
        return [i for i in chain.from_iterable(parts) if not self.reserved[i]]  # a normaliser may still have made one: drop it

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Where a word begins, for whole-word masking.

        By the mark of the vocabulary: "##" continues a word of WordPiece, "Ġ" or "▁" begins one of byte-level BPE or
        SentencePiece. The latter two have no mark between punctuation and letters; there a word is a run of either.
        """
        if self._starts is None:
            wordpiece = sum(piece.startswith("##") for piece in self._pieces) > len(self._pieces) / 100
            begins = np.array([not p.startswith("##") if wordpiece else not _is_word(p[:1]) for p in self._pieces])
            ends = np.array([not wordpiece and not _is_word(p[-1:]) and p[-1:] not in ("Ġ", "▁") for p in self._pieces])
            self._starts = begins, ends
        begins, ends = self._starts
        starts = begins[ids]
        starts[1:] |= ends[ids[:-1]]
        starts[:1] = True
        return starts

    @property
    def fingerprint(self) -> str:
        """Names the vocabulary and what is done to text, independent of library versions and of how the file is laid out."""
        probe = np.concatenate(self.encode_batch([*PROBE.split(" "), PROBE])).tolist()
        content = json.dumps([list(self._pieces), sorted(self.special.items()), self._rules(), probe])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the folder that `open_tokenizer` and transformers read; the tokenizer's own file comes last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {f"{role}_token": self._pieces[i] for role, i in self.special.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles} if self.file == "tokenizer.json" else roles
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode() + b"\n")
        write_atomically(folder / self.file, self._content())

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat(self._encode(texts))

    def _rules(self) -> Any:
        """What tells apart two tokenizers of the same pieces."""
        raise NotImplementedError

    def _content(self) -> bytes:
        raise NotImplementedError


def _flat(batch: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    return np.fromiter(chain.from_iterable(batch), np.int32, int(lengths.sum())), lengths


def _is_word(character: str) -> bool:
    return character.isalnum() and character not in "ĠĊĉ▁"  # the marks of byte-level BPE are letters to Unicode


class HuggingFace(Tokenizer):
    """A `tokenizers.Tokenizer`: anything that has a tokenizer.json."""

    file = "tokenizer.json"

    def __init__(self, backend: tokenizers.Tokenizer, spelled: dict[str, str]) -> None:
        ids = backend.get_vocab(with_added_tokens=True)
        special = {role: ids[piece] for role, piece in spelled.items() if piece in ids}
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([piece for piece in spelled.values() if piece in ids])  # those that a careless file left unmarked
        backend.encode_special_tokens = True
        control = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        pieces = [f"<hole {i}>" for i in range(max(ids.values()) + 1)]
        for piece, i in ids.items():
            pieces[i] = piece
        super().__init__(pieces, special, control)
        self._backend = backend

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _words(self) -> Words | None:
        """The quick way for this tokenizer, if there is one."""
        added = [token for token in self._backend.get_added_tokens_decoder().values() if not token.special]
        if any(len(token.content) < 2 or (token.normalized and self._backend.normalizer) for token in added):
            return None  # the latter are looked for in what the normaliser makes of a text, so the text does not tell where they are
        cuts = cuts_of(self._backend)
        return Words(cuts, [token.content for token in added], self._encode_parts) if cuts else None

    def _encode_parts(self, parts: list[str]) -> Iterator[bytes]:
        """The ids of each, int32. As the words of one text they are encoded apart as well, at half the time."""
        for at in range(0, len(parts), 256):
            batch = parts[at : at + 256]
            found = self._backend.encode_batch([batch], is_pretokenized=True, add_special_tokens=False)[0]
            ids = np.array(found.ids, np.int32).tobytes()
            ends = np.cumsum(4 * np.bincount(np.array(found.word_ids, np.int64), minlength=len(batch))).tolist()
            yield from (ids[begin:end] for begin, end in pairwise([0, *ends]))

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._words.encode(texts) if self._words else super()._encode_flat(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def _rules(self) -> Any:
        merges = json.loads(self._backend.to_str())["model"].get("merges", [])
        return [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]

    def _content(self) -> bytes:
        return self._backend.to_str(pretty=True).encode()


class SentencePiece(Tokenizer):
    """A `sentencepiece.SentencePieceProcessor`."""

    file = "tokenizer.model"

    def __init__(self, backend: sentencepiece.SentencePieceProcessor, spelled: dict[str, str]) -> None:
        size = backend.get_piece_size()
        pieces = [backend.id_to_piece(i) for i in range(size)]
        own = {"eos": backend.eos_id(), "bos": backend.bos_id(), "pad": backend.pad_id(), "unk": backend.unk_id()}
        special = {role: i for role, i in own.items() if i >= 0}
        special |= {role: pieces.index(piece) for role, piece in spelled.items() if piece in pieces}
        super().__init__(pieces, special, [i for i in range(size) if backend.is_control(i)])
        self._backend = backend

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def _rules(self) -> Any:
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        return self._backend.serialized_model_proto()


def open_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer.json, a SentencePiece .model, a folder with either, or the name of a Hugging Face tokenizer."""
    path = Path(source)
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        return _open_file(file, _configured(path)) if file else _open_by_name(str(path))
    if path.is_file():
        return _open_file(path, {})
    if path.suffix in (".json", ".model") or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"tokenizer {source} does not exist; give a tokenizer.json, a .model, a folder, a Hugging Face name or train:bpe")
    return _open_by_name(str(source))


def stored_tokenizer(prefix: str | Path) -> Tokenizer | None:
    """The tokenizer beside these shards, checked against their manifest; None for files that Megatron made."""
    manifest, folder = Manifest.find(prefix), Path(f"{output_of(prefix)}.tokenizer")
    if not folder.is_dir():
        if manifest is not None:
            raise UserError(f"tokenizer {folder} is missing beside its shards; copy it there too, or prepare the corpus again")
        return None
    tokenizer = open_tokenizer(folder)
    if manifest is not None and manifest.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer {folder} has fingerprint {tokenizer.fingerprint[:12]}, {prefix} was made with {manifest.tokenizer[:12]}; "
            "put the old folder back or prepare the corpus again"
        )
    return tokenizer


def _open_file(path: Path, spelled: dict[str, str]) -> Tokenizer:
    try:
        if path.suffix == ".model":
            import sentencepiece

            backend = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            return SentencePiece(backend, _known([backend.id_to_piece(i) for i in range(backend.get_piece_size())]) | spelled)
        import tokenizers

        fast = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as problem:  # both libraries raise bare Exception or RuntimeError
        raise UserError(f"tokenizer {path} cannot be read ({problem}); give a tokenizer.json or a SentencePiece .model") from None
    return HuggingFace(fast, _known(fast.get_vocab(with_added_tokens=True)) | spelled)


def _open_by_name(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of every try; one line from us says it all
    try:
        found = AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"tokenizer {name} is a folder without {', '.join(FILES)}, and transformers opens it no other way ({reason}); give another"
            if Path(name).is_dir()
            else f"tokenizer {name} is no file, and Hugging Face gives none of that name ({reason}); give a file, or train:bpe"
        ) from None
    if not getattr(found, "is_fast", False):
        raise UserError(f"tokenizer {name} has no fast version; give its tokenizer.json or .model file")
    spelled = {role: getattr(found, f"{role}_token", None) for role in ROLES}
    return HuggingFace(found.backend_tokenizer, {role: piece for role, piece in spelled.items() if piece})


def _known(pieces: Iterable[str]) -> dict[str, str]:
    there = set(pieces)
    return {role: next(s for s in spellings if s in there) for role, spellings in ROLES.items() if there.intersection(spellings)}


def _configured(folder: Path) -> dict[str, str]:
    """Roles as tokenizer_config.json and special_tokens_map.json give them."""
    spelled = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                config = json.loads((folder / name).read_text("utf-8"))
                for role in ROLES:
                    token = config.get(f"{role}_token")
                    token = token["content"] if isinstance(token, dict) else token
                    if token:
                        spelled[role] = token + ""
            except (ValueError, AttributeError, TypeError, KeyError) as problem:
                raise UserError(f"{folder / name} cannot be read ({problem}); mend it, or give the tokenizer's own file") from None
    return spelled
