"""lm-evaluation-harness on a checkpoint of ours: its figure is the one worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from starts import make_start

from megalite.convert.memory import load
from megalite.errors import UserError
from megalite.evaluate import judge

TEXTS = ["the film was a story", "people in town with good music and rain"]
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("start") / "gpt", "gpt", style="llama")


@pytest.mark.long
def test_bits_a_byte_are_those_of_the_exported_model(gpt: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "toy.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    judge.evaluate(judge.Evaluation(model=(str(gpt),), harness=("toy",), harness_tasks=str(tmp_path), output=str(tmp_path / "e")), {})
    found = json.loads((tmp_path / "e.json").read_text())
    loaded, nats = load(str(gpt)), 0.0
    for text in TEXTS:
        ids = torch.tensor([[loaded.tokenizer.special["eos"], *loaded.tokenizer.encode_batch([text])[0].tolist()]])
        with torch.no_grad():
            nats += float(torch.nn.functional.cross_entropy(loaded.model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum"))
    assert found["toy bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, TEXTS)), rel=1e-6)


def test_an_unknown_task_or_data_beside_it_is_refused(gpt: Path) -> None:
    with pytest.raises(UserError, match="no task nothing_like_it"):
        judge.evaluate(judge.Evaluation(model=(str(gpt),), harness=("nothing_like_it",)), {})
    with pytest.raises(UserError, match="--data = x is of no use to --harness"):
        judge.evaluate(judge.Evaluation(model=(str(gpt),), harness=("toy",), data=("x",)), {})
