"""Every recipe is a valid run, its model has the published size, and every DeepSpeed file holds only what is DeepSpeed's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import megalite
from megalite import config, ds_config, fit, models
from megalite.config import Config
from megalite.models import counts

ROOT = Path(megalite.__file__).parents[1]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
PUBLISHED = {
    "gpt2-124m": 124_439_808,  # openai-community/gpt2
    "gpt-350m": 354_823_168 + 1024 * 1024,  # openai-community/gpt2-medium, and as many positions again
    "gpt-1.3b": 1_315_758_080 - (15 + 2) * 2048,  # OPT-1.3B: the same shape with 15 more tokens and 2 more positions
    "gpt-2.7b": 2_651_596_800 - (15 + 2) * 2560,  # OPT-2.7B, likewise
    "gpt-7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "gpt-13b": 13_015_864_320,  # meta-llama/Llama-2-13b-hf
    "gpt-70b": 68_976_648_192,  # meta-llama/Llama-2-70b-hf
    "bert-base": 110_106_428,  # BertForPreTraining of google-bert/bert-base-uncased
    "bert-large": 336_226_108,  # BertForPreTraining of google-bert/bert-large-uncased
}
TINY = ("gpt-tiny", "bert-tiny")


def recipe(name: str) -> Config:
    return Config.model_validate(yaml.safe_load((ROOT / "megalite" / "recipes" / f"{name}.yaml").read_text()))


def transformers_model(name: str) -> PreTrainedModel:
    m = recipe(name).model
    shape = {"hidden_size": m.width, "num_hidden_layers": m.layers, "num_attention_heads": m.heads, "intermediate_size": m.mlp_width}
    if m.family == "bert":
        return BertForPreTraining(BertConfig(vocab_size=m.vocab, **shape))
    if m.positions == "rope":
        return LlamaForCausalLM(LlamaConfig(vocab_size=m.vocab, num_key_value_heads=m.num_kv_heads, **shape))
    return GPT2LMHeadModel(GPT2Config(vocab_size=m.vocab, n_embd=m.width, n_layer=m.layers, n_head=m.heads, n_positions=m.sequence))


def test_the_recipes_are_the_ones_listed_here() -> None:
    assert config.recipes() == sorted([*PUBLISHED, *TINY])


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_a_recipe_is_a_valid_run_under_its_own_name(name: str) -> None:
    assert recipe(name).name == name
    assert config.load(name) == recipe(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    model = recipe(name).model
    whole = models.build(model, seed=1, device="meta")
    assert sum(p.numel() for p in whole.parameters()) == counts.num_parameters(model) == PUBLISHED[name]
    assert all(p.is_meta for p in whole.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_same_shape_with_as_many_parameters(name: str) -> None:
    with torch.device("meta"):
        theirs = transformers_model(name)
    theirs.tie_weights()
    assert theirs.num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_carries_all_a_laptop_needs(name: str) -> None:
    run = recipe(name)
    assert run.data.corpus == ("stdlib",) and run.data.train == (f"data/stdlib-{run.model.family}",)
    assert run.data.corpus_tokenizer == {"gpt": "train:bpe", "bert": "train:wordpiece"}[run.model.family]
    assert run.model.vocab is None, "the tokenizer decides"
    assert (run.train.precision, run.deepspeed) == ("fp32", "zero3")
    model = run.model.model_copy(update={"vocab": run.data.corpus_vocab})
    assert counts.num_parameters(model) < 2_000_000


EIGHT_RANKS = [(name, 8) for name in (*PUBLISHED, *TINY) if name != "gpt-70b"]


@pytest.mark.parametrize(("name", "world"), [*EIGHT_RANKS, ("gpt2-124m", 1), ("gpt-7b", 64), ("gpt-70b", 512), ("bert-base", 16)])
def test_a_recipe_fits_its_mesh(name: str, world: int) -> None:
    run = fit.resolve_mesh(recipe(name), world)
    assert (run.mesh.dp or 0) * run.mesh.pp * run.mesh.tp == world


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_a_recipe_warms_up_for_a_small_part_of_its_steps(name: str) -> None:
    run = recipe(name)
    assert 0 < run.optimizer.warmup <= run.train.steps / 5


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_a_recipe_names_a_deepspeed_file_that_goes_with_it(name: str) -> None:
    path = ROOT / "ds_configs" / f"{recipe(name).deepspeed}.json"
    assert ds_config.read_document(recipe(name)) == json.loads(path.read_text())


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_a_deepspeed_file_says_only_what_deepspeed_owns_and_deepspeed_accepts_it(path: Path) -> None:
    document = json.loads(path.read_text())
    assert list(document) == ["zero_optimization"]
    zero = DeepSpeedZeroConfig(**document["zero_optimization"])
    assert path.stem.startswith(("zeropp", "zero3") if int(zero.stage) == 3 else f"zero{int(zero.stage)}")
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert document["zero_optimization"].keys() <= names
    stage3 = [key for key in document["zero_optimization"] if key.startswith("stage3_")]
    assert bool(stage3) == (int(zero.stage) == 3)


def test_zero_3_shards_the_matrices_of_the_tiny_recipes_too() -> None:
    """A threshold above their size would keep them whole, and ZeRO-3 would shard nothing but the embedding on a laptop."""
    threshold = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())["zero_optimization"]["stage3_param_persistence_threshold"]
    for name in TINY:
        run = recipe(name)
        fused = 3 * run.model.width * run.model.width // run.mesh.tp
        assert run.model.width < threshold < fused


def test_every_deepspeed_file_is_described() -> None:
    text = (ROOT / "ds_configs" / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in text for path in DS_CONFIGS) and len(DS_CONFIGS) >= 3


def test_the_page_about_deepspeed_names_every_key_and_its_owner() -> None:
    rows = [line for line in (ROOT / "ds_configs" / "README.md").read_text().splitlines() if line.startswith("| ")]
    for owner, keys in (("run config", ds_config.OWNED), ("DeepSpeed JSON", ds_config.PASSED)):
        for key in keys:
            assert [row.split(" | ")[0] for row in rows if f"`{key}`" in row.split(" | ")[1]] == [f"| {owner}"], key
