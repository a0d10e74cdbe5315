"""The loader: the same global batch on every mesh, and sources that fit together or say why not."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megalite.config import Data, Model
from megalite.data.loader import Loader, open_train, open_valid
from megalite.data.mixture import Mixture
from megalite.data.prepare import Preparation, prepare
from megalite.data.shards import Shard, Writer
from megalite.errors import UserError

GPT = Model(sequence=32)
BERT = Model(family="bert", sequence=64, activation="gelu")


class Count:
    """Sample i is i; some samples fail, some are slow."""

    def __init__(self, *, failing: int = -1) -> None:
        self.failing, self.asked = failing, []

    def sample(self, number: int) -> dict[str, np.ndarray]:
        self.asked.append(number)
        if number == self.failing:
            raise UserError(f"sample {number} is bad")
        return {"ids": np.array([number, -number]), "length": np.array(2)}


@pytest.fixture(scope="module")
def shards(corpus, bpe, wordpiece, tmp_path_factory) -> Path:
    """gpt and bert, prepared; other, with another tokenizer; megatron, without a manifest."""
    folder = tmp_path_factory.mktemp("shards")
    few = folder / "few.jsonl"
    few.write_bytes(b"".join(corpus.read_bytes().splitlines(keepends=True)[:120]))
    for name, tokenizer, extra in (("gpt", bpe, {}), ("bert", wordpiece, {}), ("other", "train:bpe", {"vocab_size": 500})):
        settings = {
            "inputs": (str(few),),
            "output": f"{folder}/{name}",
            "tokenizer": tokenizer,
            "splits": (0.8, 0.2, 0.0),
            "workers": 1,
            **extra,
        }
        prepare(Preparation(**settings), console=Console(file=io.StringIO()))
    for ending in ("bin", "idx"):
        (folder / f"megatron_text_document.{ending}").write_bytes(Path(f"{folder}/gpt.train.{ending}").read_bytes())
    return folder


def numbers(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["ids"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (1, 12), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_every_mesh_reads_the_same_global_batch(dp, micro):
    ranks = [Loader(Count(), global_batch=12, micro_batch=micro, dp=dp, dp_rank=rank) for rank in range(dp)]
    for step in (0, 1, 7):
        read = [numbers(loader.step(step)) for loader in ranks]
        assert [i for rank in read for batch in rank for i in batch] == list(range(12 * step, 12 * step + 12))
        assert all(len(batch) == micro for rank in read for batch in rank)
        assert {len(rank) for rank in read} == {ranks[0].num_microbatches}
    for loader in ranks:
        loader.close()


def test_steps_may_be_asked_in_any_order_and_again():
    with Loader(Count(), global_batch=4, micro_batch=2) as loader:
        for step in (5, 6, 2, 2, 1000, 7, 6):
            assert numbers(loader.step(step)) == [[4 * step, 4 * step + 1], [4 * step + 2, 4 * step + 3]]


def test_microbatches_are_tensors_with_the_batch_first():
    with Loader(Count(), global_batch=4, micro_batch=2) as loader:
        batch = loader.step(0)[1]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "ids": (torch.int64, (2, 2)),
        "length": (torch.int64, (2,)),
    }


def test_the_next_step_is_read_before_it_is_asked_for():
    source = Count()
    with Loader(source, global_batch=2, micro_batch=1) as loader:
        loader.step(0)
        limit = time.monotonic() + 10
        while len(source.asked) < 6 and time.monotonic() < limit:
            time.sleep(0.005)
        assert source.asked == [0, 1, 2, 3, 4, 5]


def test_an_error_while_reading_ahead_is_raised_when_its_step_is_asked():
    with Loader(Count(failing=3), global_batch=2, micro_batch=1) as loader:
        assert numbers(loader.step(0)) == [[0], [1]]
        with pytest.raises(UserError, match="sample 3 is bad"):
            loader.step(1)
        assert numbers(loader.step(2)) == [[4], [5]]


def test_closing_ends_the_thread():
    loader = Loader(Count(), global_batch=2, micro_batch=1)
    loader.step(0)
    assert any(t.name.startswith("loader") for t in threading.enumerate())
    loader.close()
    assert not any(t.name.startswith("loader") for t in threading.enumerate())


def test_no_global_random_numbers_are_used(shards):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for family, model in (("gpt", GPT), ("bert", BERT)):
        with Loader(open_train(Data(train=(f"{shards}/{family}",)), model=model, seed=3).source, global_batch=4, micro_batch=2) as loader:
            loader.step(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_global_batch_that_does_not_divide_is_refused():
    message = r"train.global_batch = 12 is not divisible by mesh.dp x train.micro_batch = 4 x 2 = 8; choose a multiple of it"
    with pytest.raises(UserError, match=message):
        Loader(Count(), global_batch=12, micro_batch=2, dp=4)


def test_a_prefix_stands_for_its_training_split_and_validation_lies_beside_it(shards):
    data = Data(train=(f"{shards}/gpt",))
    train, valid = open_train(data, model=GPT, seed=1), open_valid(data, model=GPT)
    assert [s.prefix for s in train.shards] == [f"{shards}/gpt.train"]
    assert valid is not None
    assert valid.shards[0].prefix == f"{shards}/gpt.valid"
    assert train.tokenizer is not None
    assert train.vocab_size == train.tokenizer.vocab_size == 800
    stream = Shard(f"{shards}/gpt.valid").tokens(0, 65).tolist()
    assert valid.source.sample(1)["ids"].tolist() == stream[32:64]
    assert (
        open_train(Data(train=(f"{shards}/gpt.train",)), model=GPT, seed=1).source.sample(9)["ids"].tolist()
        == train.source.sample(9)["ids"].tolist()
    )


def test_without_a_validation_split_there_is_no_validation(shards):
    assert open_valid(Data(train=(f"{shards}/megatron_text_document",), tokenizer=f"{shards}/gpt.tokenizer"), model=GPT) is None
    given = open_valid(Data(train=(f"{shards}/gpt",), valid=f"{shards}/gpt.train"), model=GPT)
    assert given is not None
    assert given.shards[0].prefix == f"{shards}/gpt.train"


def test_bert_reads_the_settings_of_the_run(shards):
    data = Data(train=(f"{shards}/bert",), sequence=48, mask_fraction=0.3, whole_word=True)
    opened = open_train(data, model=BERT, seed=1)
    assert isinstance(opened.source, Mixture)
    masked = opened.source.datasets[0]
    assert (masked.length, masked.mask_fraction, masked.whole_word) == (48, 0.3, True)
    sample = opened.source.sample(0)
    assert sorted(sample) == ["ids", "labels", "length", "next_sentence", "segments"]
    assert abs(int((sample["labels"] != -100).sum()) - 0.3 * (int(sample["length"]) - 3)) < 2


def test_bert_validation_has_the_same_masks_in_every_run(shards):
    data = Data(train=(f"{shards}/bert",))
    first, second = (open_valid(data, model=BERT) for _ in range(2))
    assert first is not None
    assert second is not None
    size = len(first.source)
    for number in (0, 3):
        for again in (second.source.sample(number), first.source.sample(number + size)):
            assert all((again[name] == value).all() for name, value in first.source.sample(number).items())


def test_weights_blend_shards_and_no_weights_blend_by_size(shards):
    def shares(*train):
        source = open_train(Data(train=train), model=GPT, seed=1).source
        return np.bincount([source.locate(n)[0] for n in range(1000)]) / 1000

    assert shares(f"{shards}/gpt=3", f"{shards}/gpt.valid=1") == pytest.approx([0.75, 0.25], abs=0.002)
    sizes = [Shard(f"{shards}/gpt.{split}").num_tokens for split in ("train", "valid")]
    assert shares(f"{shards}/gpt", f"{shards}/gpt.valid") == pytest.approx(np.array(sizes) / sum(sizes), abs=0.005)


def test_shards_of_megatron_take_the_tokenizer_that_is_given(shards):
    prefix = f"{shards}/megatron_text_document"
    ours = open_train(Data(train=(f"{shards}/gpt",)), model=GPT, seed=1)
    theirs = open_train(Data(train=(prefix,), tokenizer=f"{shards}/gpt.tokenizer"), model=GPT, seed=1)
    unnamed = open_train(Data(train=(prefix,)), model=Model(sequence=32, vocab=1000), seed=1)
    assert theirs.vocab_size == 800
    assert (unnamed.tokenizer, unnamed.vocab_size) == (None, 1000)
    for other in (theirs, unnamed):
        assert (other.source.sample(5)["ids"] == ours.source.sample(5)["ids"]).all()


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({}, {}, r"data.train names no shards; set it to a prefix made by: megalite prepare"),
        ({"train": ("S/none",)}, {}, r"S/none.train.bin does not exist; make it: megalite prepare INPUT... --output S/none --tokenizer"),
        ({"train": ("S/gpt=0",)}, {}, r"data.train = S/gpt=0: weight 0 is no number above 0; write PREFIX=WEIGHT, for instance S/gpt=0.5"),
        ({"train": ("S/gpt=half",)}, {}, r"weight half is no number above 0"),
        ({"train": ("S/gpt=1", "S/gpt.valid")}, {}, r"gives a weight to some shards only; give one to all"),
        (
            {"train": ("S/gpt", "S/other")},
            {},
            r"S/other.train was made with tokenizer \w+, S/gpt.train has \w+; prepare all shards with one",
        ),
        (
            {"train": ("S/gpt",), "tokenizer": "S/other.tokenizer"},
            {},
            r"S/gpt.train was made with tokenizer \w+, data.tokenizer = S/other.tokenizer has",
        ),
        (
            {"train": ("S/megatron_text_document",)},
            {},
            r"names no tokenizer \(Megatron's files do not\); set data.tokenizer or model.vocab",
        ),
        ({"train": ("S/gpt",)}, {"vocab": 799}, r"model.vocab = 799 is smaller than the tokenizer's vocabulary of 800"),
        (
            {"train": ("S/gpt",), "sequence": 33},
            {},
            r"data.sequence = 33 is longer than model.sequence = 32; lower it or raise model.sequence",
        ),
        ({"train": ("S/gpt",)}, {"family": "bert", "activation": "gelu"}, r"needs the special tokens pad, cls, sep, mask"),
        (
            {"train": ("S/megatron_text_document",)},
            {"family": "bert", "vocab": 900},
            r"bert needs the tokenizer of S/megatron_text_document to mask",
        ),
        (
            {"train": ("S/megatron_text_document",), "document_mask": True},
            {"vocab": 900},
            r"document_mask needs the end-of-text token of S/megatron_text_document, which names no tokenizer; set data.tokenizer",
        ),
        (
            {"train": ("S/bert",), "document_mask": True},
            {},
            r"document_mask needs an end-of-text token, but the tokenizer of S/bert.train has only cls, mask, pad, sep",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(shards, data, model, message, monkeypatch):
    monkeypatch.chdir(shards.parent)
    (shards.parent / "S").unlink(missing_ok=True)
    (shards.parent / "S").symlink_to(shards)
    with pytest.raises(UserError, match=message):
        open_train(Data(**data), model=Model(**{"sequence": 32, **model}), seed=1)


def test_a_document_mask_comes_with_prepared_text(shards):
    opened = open_train(Data(train=(f"{shards}/gpt",), document_mask=True), model=GPT, seed=1)
    ends = opened.tokenizer.special["eos"]
    samples = [opened.source.sample(number) for number in range(300)]
    assert any(sample["documents"][-1] for sample in samples)
    for sample in samples:
        assert (sample["labels"] == -100).tolist() == (sample["ids"] == ends).tolist()
        assert sample["documents"][1:].tolist() == np.cumsum(sample["ids"][:-1] == ends).tolist()


def test_a_validation_shard_with_another_tokenizer_is_refused(shards):
    with pytest.raises(UserError, match=r"gpt.train was made with tokenizer \w+, .*other.valid has \w+"):
        open_valid(Data(train=(f"{shards}/gpt",), valid=f"{shards}/other"), model=GPT)


def test_opening_and_sampling_take_no_time_however_many_sentences_there_are(tmp_path, wordpiece):
    count = 3_000_000
    with Writer(tmp_path / "large", vocab_size=800) as writer:
        writer.add(np.full(count, 100), lengths=np.ones(count, np.int64), ends=np.arange(3, count + 1, 3))
    began = time.process_time()
    opened = open_train(Data(train=(f"{tmp_path}/large",), tokenizer=wordpiece), model=BERT, seed=0)
    for number in range(2000):
        opened.source.sample(number + 10**12)
    assert time.process_time() - began < 2  # one look at the whole index a sample would take twice that
