"""Fine-tuning end to end on forked ranks: the same on every mesh, it learns, it stops, it goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from starts import counted, dialogues, make_start, metrics, reviews, tagged, translations

from megalite import finetune as tuning
from megalite.checkpoint.store import read_facts, whole
from megalite.convert.memory import load
from megalite.convert.starting import find_checkpoint
from megalite.data.rows import Faults, read_rows
from megalite.errors import UserError
from megalite.evaluate import judge, vectors
from megalite.evaluate.text import Generation, fill, write

QUIET = {"log": {"every": 1, "tensorboard": False}}
LARGE = {"global_batch": 32, "micro_batch": 16}


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("starts")
    return {"bert": make_start(folder / "bert", "bert"), "gpt": make_start(folder / "gpt", "gpt", style="llama"), "folder": folder}


def tune(folder: Path, start: Path, kind: str, rows: Path, held: Path | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Fine-tune into this folder; the lines of its metrics."""
    task = {"kind": kind, "start": str(start), "train": [str(rows)], "valid": [str(held)] if held else [], **settings.pop("task", {})}
    document = {"run": {"folder": str(folder)}, "task": task, **QUIET, "model": {"dropout": 0.0}, **settings}
    tuning.finetune(document, command="finetune")
    return metrics(folder)


MESHES = {
    "dp2 pp2 ZeRO-3": {"mesh": {"dp": 2, "pp": 2}, "deepspeed": "zero3"},
    "pp2 tp2 ZeRO-1": {"mesh": {"pp": 2, "tp": 2}, "deepspeed": "zero1"},
}


@pytest.mark.parametrize(
    ("mesh", "kind", "family"),
    [
        ("dp2 pp2 ZeRO-3", "classify", "bert"),
        ("pp2 tp2 ZeRO-1", "translate", "gpt"),
        pytest.param("pp2 tp2 ZeRO-1", "classify", "bert", marks=pytest.mark.slow),
        pytest.param("dp2 pp2 ZeRO-3", "translate", "gpt", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_tunes_step_by_step_as_one_process(kind: str, family: str, mesh: str, starts, tmp_path: Path) -> None:
    make = reviews if kind == "classify" else translations
    train, valid = make(tmp_path / "train.tsv", 90, seed=1), make(tmp_path / "valid.tsv", 21, seed=2)  # 21: the last batch is filled up
    common: dict[str, Any] = {"train": {"steps": 6, "global_batch": 16, "micro_batch": 4}, "optimizer": {"lr": 3e-3, "eps": 1e-3}}
    common |= {"validation": {"every": 3}, "model": {"dropout": 0.1}}
    plain = tune(tmp_path / "plain", starts[family], kind, train, valid, **common)
    spread = tune(tmp_path / "mesh", starts[family], kind, train, valid, **common, **MESHES[mesh])
    assert len(plain) == len(spread) == 8
    for ours, theirs in zip(spread, plain, strict=True):
        for name in theirs.keys() & {"loss", "grad_norm", "lr", "valid_loss", "accuracy", "macro_f1", "perplexity", "tokens"}:
            # sums of fp32 in another order, over six updates; every gradient and weight of a step: tests/parity/test_heads.py
            assert ours[name] == pytest.approx(theirs[name], rel=5e-6), (theirs["step"], name)


def test_a_classifier_learns_keeps_its_best_and_is_the_same_in_transformers(starts, tmp_path: Path) -> None:
    train, valid = reviews(tmp_path / "train.tsv", 600, seed=1), reviews(tmp_path / "valid.tsv", 100, seed=2)
    folder = tmp_path / "run"
    tune(folder, starts["bert"], "classify", train, valid, optimizer={"lr": 3e-3}, task={"epochs": 6}, mesh={"dp": 2}, train=LARGE)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["accuracy"] > 0.95
    best = find_checkpoint(str(folder))
    assert best is not None and read_facts(best)["score"] == scores["macro_f1"] == max(
        m["macro_f1"] for m in metrics(folder) if "macro_f1" in m
    )
    evaluated = judge.evaluate(judge.Evaluation(model=(str(folder),), data=(str(valid),)), {"mesh": {"pp": 2}})
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["accuracy"] == scores["accuracy"] and again["loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert any("accuracy" in line for line in evaluated) and "| wanted, given | bad | good |" in (folder / "evaluation.md").read_text()
    loaded, right = load(str(folder)), 0
    assert type(loaded.model).__name__ == "BertForSequenceClassification" and loaded.model.config.id2label == {0: "bad", 1: "good"}
    for row in read_rows([str(valid)], ["text", "label"], Faults(refuse=True)):
        with torch.no_grad():
            logits = loaded.model(**loaded.theirs(row.values[0], return_tensors="pt")).logits[0]
        right += loaded.model.config.id2label[int(logits.argmax())] == row.values[1]
    assert right / 100 == pytest.approx(scores["accuracy"])


def test_tags_and_numbers_are_learned(starts, tmp_path: Path) -> None:
    tags = tune(
        tmp_path / "tag", starts["bert"], "tag", tagged(tmp_path / "a.jsonl", 300, seed=1), tagged(tmp_path / "b.jsonl", 60, seed=2),
        optimizer={"lr": 3e-3}, task={"epochs": 6},
    )  # fmt: skip
    assert tags[-1]["f1"] > 0.95
    numbers = tune(
        tmp_path / "regress", starts["gpt"], "regress", counted(tmp_path / "a.csv", 300, seed=1), counted(tmp_path / "b.csv", 60, seed=2),
        optimizer={"lr": 3e-3}, task={"epochs": 8},
    )  # fmt: skip
    assert numbers[-1]["spearman"] > 0.9 and numbers[-1]["pearson"] > 0.9


def test_a_translation_word_for_word_reaches_90_bleu(starts, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train, test = translations(tmp_path / "train.tsv", 800, seed=1), translations(tmp_path / "test.tsv", 60, seed=2)
    tune(folder, starts["gpt"], "translate", train, optimizer={"lr": 5e-3}, task={"epochs": 10}, train=LARGE)
    judge.evaluate(judge.Evaluation(model=(str(folder),), data=(str(test),)), {})
    scores = json.loads((folder / "evaluation.json").read_text())
    assert scores["bleu"] > 90 and scores["chrf"] > 90


def test_a_chat_repeats_what_it_was_told(starts, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rows = dialogues(tmp_path / "train.jsonl", 200, seed=1)
    tune(folder, starts["gpt"], "chat", rows, optimizer={"lr": 5e-3}, task={"epochs": 22}, train=LARGE)
    from megalite.data import chat

    loaded = load(str(folder))
    asked = [chat.prompt([{"role": "user", "content": f"the {word}"}], loaded.tokenizer).tolist() for word in ("dog", "sun", "bread")]
    answers = write(loaded, asked, Generation(temperature=0, tokens=8))
    assert [answer.strip() for (answer,) in answers] == ["it is chien", "it is soleil", "it is pain"]


def test_it_stops_when_it_gets_no_better_and_has_nothing_left_to_do_then(starts, tmp_path: Path, capfd) -> None:
    train, valid = reviews(tmp_path / "train.tsv", 64, seed=1), reviews(tmp_path / "valid.tsv", 16, seed=2)
    settings: dict[str, Any] = {"optimizer": {"lr": 1e-12}, "task": {"epochs": 20, "patience": 2}, "validation": {"every": 2}}
    lines = tune(tmp_path / "run", starts["bert"], "classify", train, valid, **settings)
    assert max(line["step"] for line in lines) == 6
    assert read_facts(whole(tmp_path / "run/checkpoints")[-1])["done"]
    before = len(lines)
    assert len(tune(tmp_path / "run", starts["bert"], "classify", train, valid, **settings)) == before


def test_what_is_begun_again_ends_as_what_was_never_stopped(starts, tmp_path: Path) -> None:
    train, valid = reviews(tmp_path / "train.tsv", 64, seed=1), reviews(tmp_path / "valid.tsv", 16, seed=2)
    settings: dict[str, Any] = {
        "train": {"steps": 6, "global_batch": 16},
        "validation": {"every": 2},
        "checkpoint": {"every": 2, "keep": 9},
    }
    whole_run = tune(tmp_path / "run", starts["bert"], "classify", train, valid, **settings)
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step}")
    again = tune(tmp_path / "run", starts["bert"], "classify", train, valid, **settings)
    for ours, theirs in zip(again, whole_run, strict=True):
        assert {name: ours[name] for name in ours.keys() & {"step", "loss", "grad_norm", "valid_loss", "accuracy"}} == {
            name: theirs[name] for name in theirs.keys() & {"step", "loss", "grad_norm", "valid_loss", "accuracy"}
        }


def test_a_run_folder_of_another_task_is_refused(starts, tmp_path: Path) -> None:
    train = reviews(tmp_path / "train.tsv", 32, seed=1)
    settings: dict[str, Any] = {"train": {"steps": 1}}
    tune(tmp_path / "run", starts["bert"], "classify", train, **settings)
    with pytest.raises(UserError, match=r"choose another|change run.folder"):
        tune(tmp_path / "run", starts["bert"], "classify", reviews(tmp_path / "other.tsv", 40, seed=3), train={"steps": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"width": 64}}, "model.width = 64, but the model that is fine-tuned has 32"),
        ({"mesh": {"cp": 2}}, "judges whole sequences"),
        ({"task": {"class_weights": "balanced", "kind": "tag"}}, "is for classify"),
        ({"task": {"kind": "translate"}}, "a BERT does not"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings: dict[str, Any], message: str, starts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tune(tmp_path / "run", starts["bert"], "classify", reviews(tmp_path / "train.tsv", 32, seed=1), **settings)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        tune(tmp_path / "run", tmp_path / "nothing/here", "classify", reviews(tmp_path / "train.tsv", 32, seed=1))


def test_perplexity_of_text_is_the_plain_models_on_any_mesh(starts, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the film was a story of people in town with good music and rain " * 20)
    found = []
    for mesh in ({}, {"pp": 2, "dp": 2}):
        judge.evaluate(judge.Evaluation(model=(str(starts["gpt"]),), data=(str(text),), output=str(tmp_path / "e")), {"mesh": mesh})
        found.append(json.loads((tmp_path / "e.json").read_text()))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert found[0]["bytes"] == len(text.read_bytes()) - 1
    loaded = load(str(starts["gpt"]))
    ids = [*loaded.tokenizer.encode_batch([text.read_text()])[0].tolist(), loaded.tokenizer.special["eos"]]
    nats = 0.0
    for at in range(0, len(ids) - 1, loaded.longest):
        window = torch.tensor([ids[at : at + loaded.longest + 1]])
        with torch.no_grad():
            logits = loaded.model(window[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    assert found[0]["bits_per_byte"] == pytest.approx(nats / math.log(2) / found[0]["bytes"], rel=1e-6)


def test_a_language_model_that_was_tuned_is_judged_by_the_bytes_of_its_rows(starts, tmp_path: Path) -> None:
    rows, texts = tmp_path / "rows.jsonl", ["the film was a story of people", "good music and rain last night"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tune(tmp_path / "run", starts["gpt"], "lm", rows, train={"steps": 1, "global_batch": 2, "micro_batch": 2})
    judge.evaluate(judge.Evaluation(model=(str(tmp_path / "run"),), data=(str(rows),)), {})
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    tokenizer = load(str(starts["gpt"])).tokenizer
    firsts = sum(len(tokenizer.decode(tokenizer.encode_batch([text])[0][:1])) for text in texts)
    assert found["bytes"] == sum(map(len, texts)) - firsts  # nothing predicts the first token of a row
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / found["bytes"], rel=1e-12)


def test_vectors_do_not_depend_on_the_batch_and_find_the_text_itself(starts, tmp_path: Path) -> None:
    texts = ["the film was good", "rain in town last night and people talked", "bad", "the film was great"]
    for family, pool in (("bert", "mean"), ("bert", "cls"), ("gpt", "mean")):
        loaded = load(str(starts[family]))
        alone, together = vectors.encode(loaded, texts, pool=pool, batch=1), vectors.encode(loaded, texts, pool=pool, batch=4)
        assert alone == pytest.approx(together, abs=1e-6)
        assert [found[0][0] for found in vectors.search(together, together, top=1)] == [0, 1, 2, 3]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    said: list[str] = []
    for name in ("v.npy", "v.parquet"):
        request = vectors.Embedding(
            model=(str(starts["bert"]),), data=(str(tmp_path / "t.txt"),), output=str(tmp_path / name), query=("bad",), top=1
        )
        vectors.embed(request, say=said.append)
    assert said[-1] == "  1.000  bad"


def test_a_bert_fills_its_masks_and_needs_one(starts) -> None:
    loaded = load(str(starts["bert"]))
    filled = fill(loaded, "the [MASK] was good", number=3)
    assert len(filled) == 3 and all(text.startswith("the ") and "[MASK]" not in text for text in filled)
    with pytest.raises(UserError, match="holds no"):
        fill(loaded, "the film", number=1)


def test_samples_are_a_matter_of_the_seed_and_batches_of_padding_alone(starts) -> None:
    loaded = load(str(starts["gpt"]))
    prompts = [loaded.tokenizer.encode_batch([text])[0].tolist() for text in ("the", "the film was a story", "people in town")]
    greedy = Generation(temperature=0, tokens=6)
    alone = [write(loaded, [prompt], greedy)[0] for prompt in prompts]
    assert write(loaded, prompts, greedy) == alone
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(write(loaded, prompts, Generation(tokens=6, number=2, temperature=1.0)))
    assert drawn[0] == drawn[1] != drawn[2]
