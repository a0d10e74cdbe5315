"""One GPU: the same numbers as one process on the CPU, and a run of a published recipe that says its MFU. `make gpu` runs it."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.config import Config
from megalite.data.shards import Writer
from megalite.ds_config import read_document
from megalite.tune.parity import assemble

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from compare import assert_same, config_of, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ONE_RANK = """
import os, pickle, sys
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
sys.path.insert(0, {parity!r})
import torch, torch.distributed as dist
from compare import config_of
from megalite.tune.parity import train_rank
torch.cuda.set_device(0)
dist.init_process_group("nccl", init_method="file://{answer}.meeting", rank=0, world_size=1)
answer = train_rank(0, config=config_of(), document={document!r}, steps={steps}, device="cuda")
home = lambda owned: [(cut, start, flat.cpu()) for cut, start, flat in owned]
answer.steps = [(loss, norm, home(gradients), home(weights)) for loss, norm, gradients, weights in answer.steps]
pickle.dump(answer, open("{answer}", "wb"))
dist.destroy_process_group()
"""


def _one_rank(document: dict[str, Any], *, steps: int, tmp_path: Path) -> Any:
    """What the one rank of a GPU saw, in a process of its own."""
    path, parity = Path(tempfile.mkdtemp(dir=tmp_path), "steps.pickle"), str(Path(__file__).parent.parent / "parity")
    port = random.SystemRandom().randrange(10_000, 30_000)  # nobody listens there; DeepSpeed names its shared memory after it
    code = ONE_RANK.format(parity=parity, document=document, steps=steps, answer=path, port=port)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_computes_what_one_process_on_the_cpu_computes(stage: int, tmp_path: Path) -> None:
    document = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    ours = assemble([_one_rank(document, steps=3, tmp_path=tmp_path)], steps=3)
    assert_same(ours, reference(config_of()), tied={"head.project.weight": "embed.token.weight"})


def _train(deepspeed: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What six steps of gpt2-124m on random ids say, line by line."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    prefix = str(folder / "random")
    with Writer(f"{prefix}.train", vocab_size=50257) as writer:
        writer.add(np.random.default_rng(0).integers(0, 50257, 2_000_000).astype(np.uint16))
    run = ["--data.train", prefix, "--run.folder", str(folder / "run"), "--train.steps", "6", "--log.every", "1", "--deepspeed", deepspeed]
    mesh = ["--mesh.dp", "1", "--mesh.pp", "1", "--mesh.tp", "1", "--train.global-batch", "64", "--train.micro-batch", "16"]
    subprocess.run([sys.executable, "-m", "megalite", "train", "gpt2-124m", *run, *mesh], check=True, timeout=600)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 6 and all(np.isfinite(line["loss"]) for line in trained)
    return trained


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_a_recipe_trains_on_one_gpu_and_says_its_mfu(deepspeed: str, tmp_path: Path) -> None:
    trained = _train(deepspeed, tmp_path)
    assert all(line["mfu"] and 0 < line["mfu"] < 1 for line in trained), "the peak of this GPU is unknown to megalite.hardware"


def test_weights_from_the_host_do_not_pile_up(tmp_path: Path) -> None:
    """Where copies are faster than the computation: half of those 124 M in bf16 are not there at the fullest moment."""
    document = read_document(Config.model_validate({"deepspeed": "zero3-cpu-offload-params"}))
    held = {}
    for live in (500_000_000, 60_000_000):
        ahead = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live, "stage3_prefetch_bucket_size": 15_000_000}
        document["zero_optimization"] |= ahead
        path = tmp_path / f"{live}.json"
        path.write_text(json.dumps(document))
        held[live] = _train(str(path), tmp_path)[-1]["memory_bytes"]
    assert held[500_000_000] - held[60_000_000] > 50e6 * 2


@pytest.mark.parametrize("name", ["zero3-cpu-offload", "zero3-cpu-offload-params", "zero3-nvme", "zeropp-quantized"])
def test_a_configuration_for_gpus_trains_as_zero3_does(name: str, tmp_path: Path) -> None:
    """The losses of ten steps: those of zero3, within rounding where state is offloaded, within 2 % where weights are quantized."""
    losses = {}
    for which in ("zero3", name):
        document = read_document(Config.model_validate({"deepspeed": which, "train": {"precision": "fp32"}}))
        found = document["zero_optimization"]
        if found.get("offload_optimizer", {}).get("device") == "nvme":
            found["offload_optimizer"]["nvme_path"] = str(tmp_path / "disk")
        found.pop("zero_hpz_partition_size", None)  # one GPU has no neighbours
        losses[which] = [loss for loss, *_ in _one_rank(document, steps=10, tmp_path=tmp_path).steps]
    assert losses[name] == pytest.approx(losses["zero3"], rel=2e-2 if "quantized" in name else 1e-5)
