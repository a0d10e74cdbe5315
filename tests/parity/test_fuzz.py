"""Layouts drawn at random: any model, mesh of up to 8 ranks, ZeRO stage, schedule, reduction, precision, recomputation, dropout, offload.

`make test` runs ten of them; `make fuzz` (python tests/parity/test_fuzz.py --first 0 --draws 200) runs more and prints one line each.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from typing import Any

import pytest

from megalite.config import CHUNKED, Config
from megalite.errors import UserError
from megalite.fit import resolve_mesh
from megalite.tune.parity import assemble, on_mesh
from megalite.tune.verify import STEPS, Finding, compare, compare_rounded

HALVED = 10_000  # seeds from which on every pipeline halves its backward passes


def draw(seed: int) -> tuple[Config, dict[str, Any]]:
    """The layout of this seed: the first that is allowed of those its generator comes up with."""
    pick = random.Random(seed)
    while True:
        mesh = {axis: pick.choice((1, 1, 2, 2, 3, 4)) for axis in ("dp", "pp", "tp")}
        mesh["cp"] = pick.choice((1, 1, 1, 2, 2, 3, 4))
        world = math.prod(mesh.values())
        stage, schedule = pick.randrange(4), pick.choice(("1f1b", "gpipe", "interleaved", "looped"))
        if seed >= HALVED and mesh["pp"] > 1:
            schedule = "zerobubble"
        document = {
            "model": _model(pick, mesh["tp"] * mesh["cp"]),
            "mesh": mesh,
            "train": {
                "global_batch": mesh["dp"] * 2 * pick.choice((2, 3, 4, 6)),
                "micro_batch": pick.choice((1, 2)),
                "steps": 100,
                "precision": pick.choices(("fp32", "bf16", "fp16"), (12, 3, 1))[0],  # fp16 takes a CPU ten times as long
                "sequence_parallel": mesh["tp"] > 1 and pick.random() < 0.5,
                "schedule": schedule,
                "chunks": pick.choice((2, 3) if seed < HALVED else (None, 2)) if schedule in CHUNKED else None,
                "reduce": pick.choice((None, "microbatch", "step")) if stage > 1 else None,
                "recompute": pick.choice(("none", "full", "selective")),
                "clip": pick.choice((0.0, 0.3, 1.0)),
            },
            "optimizer": {"lr": 1e-2, "warmup": 2, "eps": 1e-2, "weight_decay": pick.choice((0.0, 0.1))},
        }
        document["data"] = {"document_mask": seed % 3 == 1 and document["model"].get("family") != "bert"}
        try:
            config = Config.model_validate(document)
            if 1 < world <= 8:
                zero = {"stage": stage, "stage3_param_persistence_threshold": pick.choice((0, 500, 10_000))}
                zero |= {"stage3_max_live_parameters": pick.choice((0, 2000, 10**9)), "stage3_max_reuse_distance": pick.choice((0, 10**9))}
                if seed % 2:  # most often a limit that a stage does not fit into, and some weights ahead
                    limits = {"stage3_max_live_parameters": pick.randrange(2000, 40_000), "stage3_max_reuse_distance": 10**9}
                    zero |= {**limits, "stage3_prefetch_bucket_size": pick.choice((0, 1000, 5000))}
                if seed % 3 and (stage < 2 or config.train.reduce == "step"):
                    zero["reduce_bucket_size"] = pick.randrange(500, 20_000)
                if stage and pick.random() < 0.2:
                    zero["offload_optimizer"] = {"device": "cpu"}
                return resolve_mesh(config, world), {"zero_optimization": zero}
        except (UserError, ValueError):
            continue


def _model(pick: random.Random, parts: int) -> dict[str, Any]:
    """Heads, and most often sequences, that can be cut into `parts`."""
    keys = parts * pick.choice((1, 2)) if parts < 4 else parts
    heads = keys * pick.choice((1, 1, 2, 3))
    shape = {
        "layers": pick.randrange(1, 7),
        # 16 at least: the bias of a norm 4 wide was seen to have a gradient that cancels to the rounding of its terms
        "width": heads * pick.choice((16, 20) if heads == 1 else (8, 10, 12)),
        "heads": heads,
        "vocab": pick.randrange(31, 100),
        "sequence": pick.choice((8, 12, 16, 24)),
        "init_std": 0.1,
        "dropout": pick.choice((0.0, 0.0, 0.1)),
        "attention_dropout": pick.choice((0.0, 0.0, 0.0, 0.1)),
    }
    if pick.random() < 0.3:
        # norms behind six blocks of weights drawn with 0.1 make one process 5e-6 of a gradient's largest element wrong, beside fp64
        return {**shape, "family": "bert", "activation": "gelu", "init_std": 0.05}
    style = {
        "kv_heads": keys,
        "mlp": pick.randrange(parts * 4, 80),
        "positions": pick.choice(("learned", "rope")),
        "norm": pick.choice(("layer", "rms")),
        "activation": pick.choice(("gelu", "gelu_tanh", "swiglu")),
        "bias": pick.random() < 0.5,
        "qkv_bias": pick.choice((None, None, True)),
        "tied": pick.random() < 0.5,
    }
    return {**shape, **style}


def findings_of(config: Config, document: dict[str, Any]) -> list[Finding]:
    steps = assemble(on_mesh(config, document, steps=STEPS), steps=STEPS)
    return compare(config, steps) if config.train.precision == "fp32" else compare_rounded(config, steps)


def _said(config: Config, document: dict[str, Any]) -> str:
    mesh, train, model = config.mesh, config.train, config.model
    axes, split = " ".join(f"{axis} {degree}" for axis, degree in mesh.degrees.items()), " split" if train.sequence_parallel else ""
    zero = document["zero_optimization"]
    offload = " offloaded" if "offload_optimizer" in zero else ""
    layout = f"{axes}{split} zero {zero['stage']}{offload} {train.schedule} x{config.num_chunks}"
    how = f"reduce {train.reduce} recompute {train.recompute} {train.precision} clip {train.clip} dropout {model.dropout}"
    how += " document mask" if config.data.document_mask else ""
    return f"{layout} {how}; {model.family} layers {model.layers} heads {model.heads}/{model.num_kv_heads} tied {model.tied}"


QUICK, LONG = (*range(3), HALVED, HALVED + 4), (*range(3, 8), HALVED + 2, HALVED + 5)


@pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(seed, marks=pytest.mark.long) for seed in LONG)])
def test_a_layout_drawn_at_random_computes_what_one_process_computes(seed: int) -> None:
    config, document = draw(seed)
    wrong = [finding for finding in findings_of(config, document) if not finding.good]
    assert not wrong, f"{_said(config, document)}: {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--draws", type=int, default=200, help="how many layouts")
    asked = parser.parse_args()
    failed = 0
    for seed in range(asked.first, asked.first + asked.draws):
        config, document = draw(seed)
        began = time.monotonic()
        try:
            worst = max(findings_of(config, document), key=lambda finding: finding.off / finding.allowed)
            good, said = worst.good, f"{worst.what} {worst.off:.1e} of {worst.allowed:.1e}"
        except Exception as error:  # a crash is a finding like any other
            good, said = False, " ".join(str(error).split())[-600:]
        failed += not good
        print(f"{seed:4d} {'same' if good else 'WRONG'} {time.monotonic() - began:4.1f} s  {_said(config, document)}: {said}", flush=True)
    print(f"{asked.draws} draws, {failed} wrong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
