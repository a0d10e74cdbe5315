"""Training goes on from an imported model on any mesh, and the result goes out again: by the commands a person gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from forked import Forked
from runs import finish, losses, make_shard, train
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megalite.config import Config
from megalite.data.loader import Loader, open_train


def _megalite(*arguments: str) -> str:
    return finish(Forked([*arguments]))


def test_training_goes_on_from_an_import_on_any_mesh_and_goes_out_again(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=44, max_position_embeddings=16, initializer_range=0.2)).eval()  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path / "theirs")
    shard = make_shard(tmp_path)
    said = _megalite("import", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"))
    assert f"train        megalite train {tmp_path}/run/config.yaml --data.train PREFIX" in said

    flags = ["--data.train", shard, "--train.steps", "3", "--train.global-batch", "4", "--train.precision", "fp32", "--log.every", "1"]
    path = tmp_path / "run/config.yaml"
    finish(train(path, tmp_path / "run", *flags, "--mesh.tp", "2", "--mesh.dp", "2", "--deepspeed", "zero3"))
    start = str(tmp_path / "run/checkpoints/step-0")
    finish(train(path, tmp_path / "other", *flags, "--mesh.pp", "2", "--deepspeed", "zero1", "--checkpoint.resume", start))
    ours, others = losses(tmp_path / "run"), losses(tmp_path / "other")
    for step in (1, 2, 3):
        assert ours[step][0] == pytest.approx(others[step][0], rel=1e-5)

    config = Config.model_validate(yaml.safe_load(path.read_text()))  # the run's own by now
    opened = open_train(config.data, model=config.model, seed=config.run.seed)
    with Loader(opened.source, global_batch=4, micro_batch=4) as loader, torch.no_grad():
        (batch,) = loader.step(0)
        logits = theirs(batch["ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    assert ours[1][0] == pytest.approx(expected, rel=1e-5), "the first loss is that of the imported model"

    assert "exported" in _megalite("export", str(tmp_path / "run/checkpoints/latest"), "--output", str(tmp_path / "back"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert not torch.equal(again.lm_head.weight, theirs.lm_head.weight)
    assert "DAMAGED" not in _megalite("checkpoint", "verify", str(tmp_path / "run"))
    assert "step-0" in (listed := _megalite("checkpoint", "ls", str(tmp_path / "run"))) and "step-3" in listed and "<- latest" in listed
    shown = _megalite("checkpoint", "show", str(tmp_path / "run/checkpoints/latest"))
    assert "weights/layers.1.attention.qkv.weight" in shown and "(64, 32)" in shown
