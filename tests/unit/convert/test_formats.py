"""A Hugging Face model comes in, computes the same, and goes out bit for bit; what cannot be said on the other side is refused in one line.

Models have random weights and odd sizes; nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megalite.checkpoint import store
from megalite.checkpoint.inspection import inspect
from megalite.config import Config
from megalite.convert import files
from megalite.convert.exporting import Export, export_model
from megalite.convert.importing import Import, import_model
from megalite.errors import UserError
from megalite.evaluate.generate import load_model

VOCAB = 101
transformers.logging.set_verbosity_error()


def _gpt2(**changes: Any) -> GPT2LMHeadModel:
    shape = {"vocab_size": VOCAB, "n_positions": 33, "n_embd": 60, "n_layer": 3, "n_head": 4, "n_inner": 142}
    return GPT2LMHeadModel(GPT2Config(**{**shape, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def _llama(kind: Any = LlamaConfig, model: Any = LlamaForCausalLM, **changes: Any) -> Any:
    shape = {
        "vocab_size": VOCAB, "hidden_size": 54, "num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 131, "max_position_embeddings": 33, "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    return model(kind(**{**shape, **changes}))


def _bert(model: Any = BertForPreTraining, **changes: Any) -> Any:
    shape = {"vocab_size": VOCAB, "hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 142}
    return model(BertConfig(**{**shape, "max_position_embeddings": 33, **changes}))


MODELS = {
    "gpt2": _gpt2,
    "gpt2, untied, plain gelu": lambda: _gpt2(tie_word_embeddings=False, activation_function="gelu"),
    "gpt2, mlp left out": lambda: _gpt2(n_inner=None),
    "llama": _llama,
    "llama, tied, one key head": lambda: _llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama, dropout": lambda: _llama(attention_dropout=0.2),
    "llama, biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: _llama(MistralConfig, MistralForCausalLM, sliding_window=None),
    "mistral, a window": lambda: _llama(MistralConfig, MistralForCausalLM, sliding_window=32, head_dim=6),
    "qwen2": lambda: _llama(Qwen2Config, Qwen2ForCausalLM),
    "qwen2, tied": lambda: _llama(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, num_key_value_heads=1),
    "bert": _bert,
}
RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def _disturb(model: nn.Module) -> nn.Module:
    """Random values on top of the initial ones, so that no bias is 0 and no norm is 1."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


def _import(source: Path, output: Path, **settings: Any) -> Path:
    return import_model(Import(source=(str(source),), output=str(output), **settings))[0]


def _export(checkpoint: Path, output: Path, **settings: Any) -> Path:
    export_model(Export(checkpoint=(str(checkpoint),), output=str(output), **settings))
    return output


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _logits(model: Any, ids: Tensor) -> list[Tensor]:
    found = model(ids)
    return [found.logits] if hasattr(found, "logits") else [found.prediction_logits, found.seq_relationship_logits]


def _our_logits(checkpoint: Path, ids: Tensor) -> list[Tensor]:
    whole, model = load_model(checkpoint)
    head, batch = whole.get_submodule("head"), {"ids": ids}
    if model.family == "bert":
        batch |= {"segments": torch.zeros_like(ids), "length": torch.full(ids.shape[:1], ids.shape[1])}
    hidden = whole.hidden(batch)
    return [head.logits(hidden)] if model.family == "gpt" else [head.logits(hidden), head.pair_logits(hidden)]  # type: ignore[operator]


@every_model
@torch.no_grad()
def test_a_model_comes_in_computes_the_same_and_goes_out_bit_for_bit(make: Any, tmp_path: Path) -> None:
    theirs = _disturb(make())
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = _import(tmp_path / "theirs", tmp_path / "run")
    assert not inspect(checkpoint).damage
    ids = torch.randint(0, VOCAB, (3, 32), generator=torch.Generator().manual_seed(2))
    expected = _logits(theirs, ids)
    for ours, wanted in zip(_our_logits(checkpoint, ids), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)

    _export(checkpoint, tmp_path / "back")
    before, after = _weights(tmp_path / "theirs"), _weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    again = (AutoModelForPreTraining if "bert" in str(type(theirs)).lower() else AutoModelForCausalLM).from_pretrained(tmp_path / "back")
    for ours, wanted in zip(_logits(again.eval(), ids), expected, strict=True):
        assert torch.equal(ours, wanted)
    for rate in RATES:
        assert getattr(again.config, rate, None) == getattr(theirs.config, rate, None), rate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_both_ways_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = _disturb(_llama()).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    _export(_import(tmp_path / "theirs", tmp_path / "run"), tmp_path / "back", dtype=name)
    before, after = _weights(tmp_path / "theirs"), _weights(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == dtype


def test_several_shards_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _disturb(_gpt2()).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    checkpoint = _import(tmp_path / "theirs", tmp_path / "run")
    monkeypatch.setattr(files.write_weights, "__kwdefaults__", {"limit": 100_000})
    _export(checkpoint, tmp_path / "back")
    written = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(written) > 2 and all(path.stat().st_size < 110_000 for path in written)
    before, after = _weights(tmp_path / "theirs"), _weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_names_as_old_files_of_the_hub_have_them(tmp_path: Path) -> None:
    """GPT-2's file has the bare trunk and masks among the weights; BERT's has the norms' names of TensorFlow."""
    _disturb(_gpt2()).save_pretrained(tmp_path / "gpt2")
    plain = load_file(tmp_path / "gpt2/model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in plain.items()} | {"h.0.attn.bias": torch.ones(1, 1, 33, 33)}
    save_file(old, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
    after = _weights(_export(_import(tmp_path / "gpt2", tmp_path / "run"), tmp_path / "back"))
    assert plain.keys() == after.keys() and all(torch.equal(plain[name], after[name]) for name in plain)

    _disturb(_bert()).save_pretrained(tmp_path / "bert")
    plain = load_file(tmp_path / "bert/model.safetensors")
    spelled = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in plain.items():
        ending = next((ending for ending in spelled if name.endswith(ending)), None)
        old[name.removesuffix(ending) + spelled[ending] if ending else name] = tensor
    save_file(old, tmp_path / "bert/model.safetensors", metadata={"format": "pt"})
    after = _weights(_export(_import(tmp_path / "bert", tmp_path / "run2"), tmp_path / "back2"))
    assert plain.keys() == after.keys() and all(torch.equal(plain[name], after[name]) for name in plain)


def test_what_a_masked_lm_lacks_is_drawn_by_the_seed_and_said(tmp_path: Path) -> None:
    _disturb(_bert(BertForMaskedLM)).save_pretrained(tmp_path / "theirs")
    path, said = import_model(Import(source=(str(tmp_path / "theirs"),), output=str(tmp_path / "run"), seed=7))
    assert said[0].startswith("drawn by seed 7, since the source has none: head.pool.weight, head.pool.bias, head.next_sentence.weight")
    found = load_model(path)[0].get_parameter("head.pool.weight")
    assert 0.015 < found.std().item() < 0.025


def test_the_tokenizer_comes_in_and_goes_out_file_by_file(tmp_path: Path) -> None:
    _gpt2().save_pretrained(tmp_path / "theirs")
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "<unk>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>", unk_token="<unk>").save_pretrained(
        tmp_path / "theirs"
    )
    checkpoint = _import(tmp_path / "theirs", tmp_path / "run")
    facts = store.read_facts(checkpoint)
    assert facts["config"]["data"]["tokenizer"] == str(tmp_path / "run/tokenizer") and len(facts["tokenizer"]) == 64
    back = _export(checkpoint, tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(back)("hello world").input_ids == [2, 3]
    config = json.loads((back / "config.json").read_text())
    assert (config["eos_token_id"], config["architectures"]) == (0, ["GPT2LMHeadModel"])
    assert (back / "generation_config.json").is_file()


def test_an_imported_run_has_a_config_that_can_be_trained(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path / "theirs")
    checkpoint = _import(tmp_path / "theirs", tmp_path / "run")
    import yaml

    config = Config.model_validate(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    assert config.run.folder == str(tmp_path / "run") and config.model.rope_base == 500.0
    assert checkpoint == tmp_path / "run/checkpoints/step-0"


REFUSED = {
    "another architecture": (lambda: transformers.OPTConfig(), "is a opt, which megalite's models cannot be; it imports gpt2, llama"),
    "scaled rotation": (
        lambda: LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "llama: rope_type = 'linear', but megalite rotates plainly",
    ),
    "an odd head": (
        lambda: LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32),
        "llama: head_dim = 32, but megalite's model has",
    ),
    "half the biases": (lambda: LlamaConfig(attention_bias=True), "llama: mlp_bias = False, but megalite's model has True"),
    "two rates of dropout": (lambda: GPT2Config(embd_pdrop=0.2), "gpt2: embd_pdrop = 0.2, but megalite's model has 0.1"),
    "another activation": (lambda: BertConfig(hidden_act="relu"), "bert: hidden_act = 'relu', but megalite's model has 'gelu'"),
    "other segments": (lambda: BertConfig(type_vocab_size=1), "bert: type_vocab_size = 1"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_our_models_cannot_be_is_refused_in_one_line(make: Any, words: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError) as caught:
        _import(tmp_path / "theirs", tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {"empty": "has no config.json", "nowhere/at/all": "does not exist"}
    _gpt2().save_pretrained(tmp_path / "torn")
    data = (tmp_path / "torn/model.safetensors").read_bytes()
    (tmp_path / "torn/model.safetensors").write_bytes(data[: len(data) // 2])
    _gpt2().save_pretrained(tmp_path / "other")
    (tmp_path / "other/config.json").write_text(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4).to_json_string())
    cases |= {"torn": "cannot be read", "other": "but config.json makes it (101, 64); they do not belong together"}
    for name, words in cases.items():
        with pytest.raises(UserError) as caught:
            _import(tmp_path / name, tmp_path / "run")
        assert words in str(caught.value) and "\n" not in str(caught.value), name
    _gpt2().save_pretrained(tmp_path / "good")
    checkpoint = _import(tmp_path / "good", tmp_path / "run")
    with pytest.raises(UserError, match="holds checkpoints already"):
        _import(tmp_path / "good", tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        _export(checkpoint, tmp_path / "full")


def test_a_model_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    _gpt2().save_pretrained(tmp_path / "theirs")
    checkpoint = _import(tmp_path / "theirs", tmp_path / "run")
    config = Config.model_validate(store.read_facts(checkpoint)["config"])
    from megalite.convert.exporting import family_of

    with pytest.raises(UserError, match=r"no model of transformers is a model with .*norm = rms"):
        family_of(config.model.model_copy(update={"norm": "rms"}))


PEAK = """
import re, sys, threading, time
from transformers import AutoConfig, GenerationConfig
from megalite.convert.importing import Import, import_model
from megalite.convert.exporting import Export, export_model

def own():  # what is mapped from a file is the system's to take back
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def look():
    global most
    while True:
        most = max(most, own())
        time.sleep(0.002)

AutoConfig.for_model("gpt2"), GenerationConfig()
before = most = own()
threading.Thread(target=look, daemon=True).start()
import_model(Import(source=(sys.argv[1],), output=sys.argv[2]))
export_model(Export(checkpoint=(sys.argv[2] + "/checkpoints/latest",), output=sys.argv[3]))
print(most - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_few_tensors_are_in_memory_whatever_the_size(tmp_path: Path) -> None:
    """A model of 290 MB whose largest tensor has 8 MB."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1009, n_positions=64, n_embd=700, n_layer=12, n_head=7, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors").stat().st_size > 280e6
    del model
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("theirs", "run", "back"))]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    with safe_open(tmp_path / "back/model.safetensors", framework="pt") as back:
        assert len(back.keys()) == 4 + 12 * 12
    assert grown < 100e6, f"{grown / 1e6:.0f} MB"
