"""The closed form of `megalite tune`: it agrees with the house it describes, and says what is asked."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalite import config as settings
from megalite.config import Config
from megalite.ds_config import read_document
from megalite.errors import UserError
from megalite.models import counts
from megalite.parallel import stages
from megalite.tune import choices, cluster, explain, memory, runtime, search, speed, tuning
from megalite.tune.layouts import Layouts, enumerate_layouts, legal
from megalite.tune.shape import Shape
from megalite.tune.splits import split

RECIPES = [name for name in settings.recipes() if settings.load(name).model.vocab]


def _find(name: str = "gpt-1.3b", machines: str = "1x8xH100", **overrides: object) -> search.Found:
    config = settings.load(name, overrides=dict(overrides))
    return search.search(config, cluster.find(machines), runtime.find("megalite", kind="h100"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_shape_counts_what_counts_py_counts(name: str) -> None:
    config = settings.load(name)
    shape = Shape.of(config)
    costs = counts.layer_costs(config.model, config.sequence)
    assert int(shape.parameters()) == counts.num_parameters(config.model)
    assert float(shape.block_flops()) == costs[1]
    assert float(shape.head_flops()) == costs[-1]
    assert float(shape.step_flops(3)) == counts.step_flops(config.model, config.sequence, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_stages_are_those_that_the_engine_builds(name: str) -> None:
    config = settings.load(name)
    shape, layers = Shape.of(config), config.model.layers
    for pp, chunks in ((1, 1), (2, 1), (4, 1), (3, 2), (2, 3)):
        if pp * chunks > layers + 2:
            continue
        parts = stages.assign(counts.layer_costs(config.model, config.sequence), pp * chunks)
        held = [[layer for part in parts[rank::pp] for layer in part] for rank in range(pp)]
        found = split(shape, Layouts.of(dp=1, tp=1, pp=pp, chunks=chunks, micro=1, batch=pp), "cost")
        for blocks, embed, head, place in zip(*(of[:, 0] for of in (found.blocks, found.embed, found.head, found.place)), strict=True):
            mine = held[int(place)]
            assert (blocks, embed, head) == (sum(0 < layer <= layers for layer in mine), 0 in mine, layers + 1 in mine)


@pytest.mark.parametrize("train", [{}, {"compile": True}, {"loss_pieces": 20000}], ids=str)
def test_a_layout_is_legal_where_the_run_would_be_accepted(train: dict[str, object]) -> None:
    draw, config = random.Random(7), settings.load("gpt-1.3b", overrides={"train": {"global_batch": 96, **train}})
    seen = set()
    for _ in range(400):
        pp, schedule = draw.choice([1, 2, 3, 4, 26, 27]), draw.choice([0, 1, 2, 3, 4])
        layout = Layouts.of(
            dp=draw.choice([1, 2, 3, 5]), tp=draw.choice([1, 2, 3, 16]), pp=pp, cp=draw.choice([1, 2, 3]), schedule=schedule,
            chunks=draw.choice([2, 3]) if schedule >= 2 else 1, micro=draw.choice([1, 2, 5, 16]), batch=96,
            split_sequence=draw.choice([0, 1]), recompute=draw.choice([0, 1, 2]),
        )  # fmt: skip
        accepted = not choices.why_not(config, layout.row(0))
        assert bool(legal(config, layout)[0]) == accepted, choices.say(layout.row(0))
        seen.add(accepted)
    assert seen == {True, False}


def test_compiled_blocks_are_offered_with_weights_that_stay_alone() -> None:
    found = _find("gpt-7b", train={"compile": True}, model={"layers": 16}).judged.layouts
    assert set(found.stage.tolist()) == {0, 1, 2, 3} and set(found.live[found.stage == 3].tolist()) == {2_000_000_000}
    with pytest.raises(UserError, match=r"with tp, train\.compile as given has no layout"):
        search.search(
            settings.load("gpt-7b", overrides={"train": {"compile": True}}),
            cluster.find("1x8xH100"),
            runtime.find("megalite"),
            pinned={"tp": 2},
        )


def test_no_limit_is_offered_that_the_vocabulary_does_not_fit_into() -> None:
    config = settings.load("gpt-1.3b", overrides={"model": {"vocab": 50304}})  # 103 M elements, half of them under tp 2
    found = enumerate_layouts(config, 8)
    smallest = {tp: int(found.live[(found.tp == tp) & (found.stage == 3)].min()) for tp in (1, 2)}
    assert smallest == {1: 500_000_000, 2: 100_000_000}
    huge = settings.load("gpt-1.3b", overrides={"model": {"vocab": 2_000_000}})
    assert set(enumerate_layouts(huge, 1).live.tolist()) == {2_000_000_000}


def test_every_layout_that_is_enumerated_would_be_accepted() -> None:
    config = settings.load("gpt2-124m", overrides={"train": {"global_batch": 24}})
    found = enumerate_layouts(config, 8)
    assert len(found) > 1000
    for row in random.Random(1).sample(range(len(found)), 200):
        assert choices.why_not(config, found.row(row)) == ""
    assert set(found.world.tolist()) == {8}


def test_the_closed_form_needs_no_torch() -> None:
    code = "import sys; from megalite.tune import tuning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _slowness() -> float:
    """Of this core now, beside a quiet one of a server of 2023: half a second of its time for so much arithmetic on arrays."""
    a, b, c = np.random.default_rng(0).random((3, 4, 1 << 14), dtype=np.float32)
    began = time.process_time()
    for _ in range(2000):
        np.where(a > b, a * c, b + c)
    return max(1.0, (time.process_time() - began) / 0.5)


def test_a_million_layouts_of_4096_gpus_take_five_seconds_of_one_core() -> None:
    def once() -> float:
        slowness, began = _slowness(), time.process_time()
        found = _find("gpt-7b", "512x8xH100", train={"global_batch": 4096})
        taken, layouts = (time.process_time() - began) / slowness, len(found.judged.layouts)
        assert layouts > 500_000
        return taken / layouts

    seen = []
    while not seen or (min(seen) >= 5e-6 and len(seen) < 10):  # the best one: other processes fill the caches
        seen.append(once())
    assert min(seen) < 5e-6, seen


def test_the_best_layout_fits_and_none_that_fits_is_faster() -> None:
    found = _find()
    best = found.order[0]
    assert found.judged.held[best] <= found.limit < found.cluster.usable
    assert found.judged.seconds[best] == found.judged.seconds.min()
    words = [choices.say(found.judged.layouts.row(row)) for row in found.best(5)]
    assert len(set(words)) == 5
    reasons = [neighbour.reason for neighbour in search.neighbours(found, int(best))]
    assert any(reason.startswith("no: ") and "of 79.1 GiB" in reason for reason in reasons)
    assert any(reason.endswith("GiB") and reason[0] in "+-" for reason in reasons)


def test_the_more_weights_may_stay_the_less_is_gathered() -> None:
    config = settings.load("gpt-7b")
    shape, given = Shape.of(config), {"dp": 8, "tp": 1, "pp": 1, "micro": 1, "stage": 3, "batch": 64, "bucket": 50_000_000}
    found = Layouts.of(**given, live=[0, 500_000_000, 2_000_000_000, 10**10])
    ours = runtime.find("megalite", kind="h100")
    seconds = speed.step_time(shape, found, split(shape, found, ours.rule), cluster=cluster.find("1x8xH100"), runtime=ours)["zero"]
    assert seconds[0] > seconds[1] > seconds[2] > seconds[3]
    gathered = speed._gathered(shape, found, np.full(4, 6.7e9), ours)
    assert gathered[0] == 6.7e9 * 2 * 8 and gathered[3] == 6.7e9
    assert gathered[2] == pytest.approx(gathered[0] - (2e9 - 5e7 - 32000 * 4096) * 15)


def test_flags_of_the_run_are_kept() -> None:
    overrides = {"mesh": {"tp": "2"}, "train": {"recompute": "full"}}
    config = settings.load("gpt-1.3b", overrides=overrides)
    pinned = choices.pins(overrides, config)
    found = enumerate_layouts(config, 8, pinned=pinned)
    assert set(found.tp.tolist()) == {2} and set(found.recompute.tolist()) == {2}


def test_zero_bubble_fills_the_bubble_with_gradients_of_weights() -> None:
    """Two of three passes over products are in it, and none of attention; four where blocks are computed again."""
    config = settings.load("gpt-1.3b", overrides={"model": {"layers": 22}})
    shape, given = Shape.of(config), {"dp": 1, "tp": 1, "pp": 8, "micro": 8, "batch": 512}
    found = Layouts.of(**given, schedule=[0, 4, 0, 4], recompute=[0, 0, 2, 2])
    ours, on = runtime.find("megalite", kind="h100"), cluster.find("1x8xH100")
    ranks = split(shape, found, ours.rule)
    idle = speed.step_time(shape, found, ranks, cluster=on, runtime=ours)["bubble"]
    once = speed.one_pass(shape, found, on, ours)
    blocks = 22 - ranks.blocks[(ranks.blocks + 2 * ranks.head).argmax(axis=0), range(4)]
    assert idle[0] - idle[1] == pytest.approx(2 / 3 * (blocks * once.block["matmul"])[0])
    assert idle[2] - idle[3] == pytest.approx(2 / 4 * (blocks * once.block["matmul"])[2])
    assert idle[0] / 3 < idle[1] < 0.7 * idle[0] and idle[2] / 2 < idle[3] < 0.8 * idle[2]


def test_a_loss_in_pieces_makes_its_logits_twice_and_keeps_none() -> None:
    """The head's three products become four; a sixteenth of the logits is there at a time."""
    ours, on = runtime.find("megalite", kind="h100"), cluster.find("1x8xH100")
    layout = Layouts.of(dp=8, tp=1, pp=1, micro=16, batch=256)
    found = {}
    for pieces in (1, 16):
        shape = Shape.of(settings.load("gpt-1.3b", overrides={"train": {"loss_pieces": pieces}}))
        parts = memory.waterfall(shape, layout, split(shape, layout, ours.rule), ours)
        found[pieces] = speed.one_pass(shape, layout, on, ours).head, float((parts["activations"] + parts["working"])[0])
    assert found[16][0]["matmul"] == pytest.approx(4 / 3 * found[1][0]["matmul"])
    assert found[16][0]["elementwise"] > found[1][0]["elementwise"]
    logits = 2 * 16 * 2048 * 50304
    assert 0.5 * logits < found[1][1] - found[16][1] < logits


def test_dropout_takes_time_and_no_memory() -> None:
    ours, on = runtime.find("megalite", kind="h100"), cluster.find("1x8xH100")
    layout = Layouts.of(dp=8, tp=1, pp=1, micro=16, batch=256)
    plain, dropping = (Shape.of(settings.load("gpt-1.3b", overrides={"model": {"dropout": rate}})) for rate in (0.0, 0.1))
    kept = [memory.waterfall(shape, layout, split(shape, layout, ours.rule), ours)["activations"] for shape in (plain, dropping)]
    times = [speed.one_pass(shape, layout, on, ours).block["elementwise"] for shape in (plain, dropping)]
    assert kept[0] == kept[1] and 1.02 < times[1] / times[0] < 1.2


def test_zero_bubble_has_one_chunk_or_several() -> None:
    for words in ("dp2 pp4 zero1 micro1 zerobubble", "dp2 pp4 zero1 micro1 zerobubble3"):
        row = choices.read(words, batch=64, world=8).row(0)
        assert choices.say(row) == words
        train = choices.as_config(settings.load("gpt-1.3b"), row).train
        assert (train.schedule, train.chunks) == ("zerobubble", 3 if words.endswith("3") else 1)


def test_settings_that_are_not_counted_are_named() -> None:
    assert tuning.left_out(settings.load("gpt-1.3b")) == []
    (said,) = tuning.left_out(settings.load("gpt-1.3b", overrides={"model": {"attention_dropout": 0.1}, "data": {"document_mask": True}}))
    assert said == "not counted  model.attention_dropout = 0.1 (more time), data.document_mask = True (less time)"


def test_what_is_written_is_a_run_that_is_accepted(tmp_path: Path) -> None:
    found = _find()
    layouts = found.judged.layouts
    for stage, offload in ((0, 0), (1, 1), (2, 0), (3, 0), (3, 2)):
        row = int(np.flatnonzero((layouts.stage == stage) & (layouts.offload == offload))[0])
        path = tmp_path / f"zero{stage}-{offload}.json"
        tuning.write(found, row, path, source="gpt-1.3b")
        run = settings.load(str(path.with_suffix(".yaml")))
        assert read_document(run) == choices.document(layouts.row(row), run) == json.loads(path.read_text())
        assert choices.why_not(run, layouts.row(row)) == ""
        assert run.mesh.world == 8


def test_a_layout_said_in_words_is_read_back() -> None:
    found = _find()
    for row in random.Random(3).sample(range(len(found.judged.layouts)), 200):
        words = found.judged.layouts.row(row)
        back = choices.read(choices.say(words), batch=words["batch"], world=8).row(0)
        assert {**back, "bucket": 0, "live": 0} == {**words, "bucket": 0, "live": 0}


def test_the_account_of_a_layout_adds_up_to_what_was_judged(tmp_path: Path) -> None:
    found = _find()
    row = int(found.order[0])
    account = explain.account(found.config, found.judged.layouts.take([row]), found)
    assert sum(account.bytes.values()) == pytest.approx(found.judged.held[row])
    assert sum(account.seconds.values()) == pytest.approx(found.judged.seconds[row])
    explain.draw(account, "a <layout>", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;layout&gt;" in page and page.count("<svg") == 2 and "http" not in page


def test_more_of_everything_needs_more_memory() -> None:
    config = settings.load("gpt-1.3b")
    shape, ours = Shape.of(config), runtime.find("megalite")

    def held(**changes: int) -> float:
        layout = Layouts.of(**{"dp": 8, "tp": 1, "pp": 1, "micro": 2, "batch": 64, "stage": 2, **changes})
        return float(memory.peak(memory.waterfall(shape, layout, split(shape, layout, "cost"), ours))[0])

    assert held(micro=4) > held() > held(micro=1)
    assert held(stage=0) > held(stage=2) > held(stage=3)
    assert held() > held(recompute=1) > held(recompute=2)
    assert held() > held(offload=1)
    assert held(dp=4, tp=2) < held(dp=8) and held(dp=4, tp=2, split_sequence=1) < held(dp=4, tp=2)
    assert held(dp=4, pp=2, schedule=1) > held(dp=4, pp=2)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("8x8xH10", "did you mean h100"),
        ("8x8", "write NODESxGPUSxKIND"),
        ("0x8xH100", "has no GPUs"),
        ("nowhere.yaml", "cannot be read"),
    ],
)
def test_a_cluster_that_is_none_is_refused(asked: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        cluster.find(asked)


def test_a_cluster_of_ones_own_takes_the_rest_from_a_known_kind(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("like: a100-80\nnodes: 3\ngpus: 4\nnode_link_gbs: 12.5\n")
    found = cluster.find(str(path))
    assert (found.world, found.node_link, found.gpu.name) == (12, 12.5e9, "A100 80GB SXM")
    path.write_text("like: a100-80\nnodes: 3\ngpus: 4\nnode_link: 12.5\n")
    with pytest.raises(UserError, match="node_link is no key of a cluster; did you mean node_link_gbs"):
        cluster.find(str(path))


@pytest.mark.parametrize("kind", cluster.table())
def test_every_kind_of_the_table_is_a_cluster(kind: str) -> None:
    found = cluster.find(f"2x8x{kind}")
    assert found.usable < found.gpu.memory_bytes * 1.001 and found.world == 16
    assert cluster.table()[kind]["source"]
    assert found.peak("fp16") > 0


@pytest.mark.parametrize(
    ("layers", "reason"), [("40", "of 256 GiB of host memory"), pytest.param("900", "of 23.5 GiB, of which", marks=pytest.mark.slow)]
)
def test_a_model_that_fits_nowhere_is_told_the_smallest_layout(layers: str, reason: str) -> None:
    overrides = {"model": {"layers": layers, "width": "8192", "heads": "64"}, "train": {"global_batch": "8"}}
    with pytest.raises(UserError, match=rf"none of .* layouts fits 1x1xrtx4090: the smallest is .* {reason}"):
        tuning.tune(tuning.Tuning(run=("gpt-7b",), cluster="1x1xrtx4090"), overrides)


def test_a_gpu_without_the_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"V100 SXM 32GB has no bf16 unit; use train.precision = fp32 or fp16"):
        _find(machines="1x8xv100")


def test_a_run_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"give --model.vocab"):
        tuning.tune(tuning.Tuning(run=("gpt-tiny",), cluster="1x8xH100"), {})


def test_precisions_have_their_widths() -> None:
    ours = runtime.find("megalite")
    assert search.for_precision(ours, Config.model_validate({"train": {"precision": "fp32"}})).width == 4
    assert search.for_precision(ours, Config.model_validate({"train": {"precision": "bf16"}})).width == 2
