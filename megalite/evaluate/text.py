"""Models that write: `megalite generate` goes on with a text or fills masks, `megalite chat` talks.

In: a checkpoint of ours on whatever mesh, or a Hugging Face model; prompts.  Out: text, as it comes where it goes to a terminal.
Sampling is
transformers' own, on the model that the checkpoint is exported to in memory (Holtzman et al. 2019, arXiv:1904.09751, for top-p).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megalite.config import Section
from megalite.convert.memory import Loaded, load
from megalite.data import chat
from megalite.errors import UserError


class Generation(Section):
    model: tuple[str, ...] = ()
    """A checkpoint, a run folder, or a Hugging Face folder or name."""
    prompt: tuple[str, ...] = ()
    """Texts to go on with; of a BERT, texts with its mask token. Left out: lines of standard input."""
    file: str | None = None
    """File with a prompt a line."""
    tokens: PositiveInt = 64
    """Most tokens to write."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0: the likeliest token always."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this share of the probability together."""
    number: PositiveInt = 1
    """Answers for each prompt; of a BERT, fillings for each mask."""
    batch: PositiveInt = 8
    """Prompts at once."""
    seed: NonNegativeInt = 0
    """Decides the samples."""
    chat: bool = False
    """Prompts are a user's turns; the chat template goes around them."""
    system: str | None = None
    """A system message in front of a conversation."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations."""
    output: str | None = None
    """Write .jsonl, a prompt and its answers a line, instead of printing."""


def generate(request: Generation, *, say: Callable[[str], None]) -> None:
    """Carry it out."""
    request.require(system="chat")
    if request.prompt and request.file:
        raise UserError(f"--prompt and --file {request.file} both give prompts; leave one of them out")
    if request.temperature == 0 and request.number > 1:
        raise UserError(
            f"--temperature 0 always writes the same answer, but --number = {request.number}; raise --temperature or leave --number out"
        )
    loaded, prompts = load(_only(request.model, "generate"), dtype=request.dtype), _prompts(request)
    torch.manual_seed(request.seed)
    if loaded.family == "bert":
        request.refuse("a BERT, which fills masks in", but=("model", "prompt", "file", "number", "dtype", "output"))
    if loaded.family == "bert":
        answers = [fill(loaded, prompt, number=request.number) for prompt in prompts]
    elif len(prompts) == 1 and request.number == 1 and not request.output:
        stream(loaded, _encode(loaded, prompts[0], request), request)
        return
    else:
        encoded = [_encode(loaded, prompt, request) for prompt in prompts]
        answers = write(loaded, encoded, request)
    if request.output:
        lines = [json.dumps({"prompt": p, "answers": a}, ensure_ascii=False) for p, a in zip(prompts, answers, strict=True)]
        Path(request.output).write_text("\n".join(lines) + "\n", "utf-8")
        say(f"{len(prompts)} prompts, {sum(map(len, answers))} answers in {request.output}")
        return
    for prompt, found in zip(prompts, answers, strict=True):
        for answer in found:
            say(f"{prompt} -> {answer}")


def talk(request: Generation, *, lines: Iterable[str], say: Callable[[str], None]) -> None:
    """A conversation: every line is a turn of the user, the answer streams to the terminal."""
    request.refuse("megalite chat", but=("model", "tokens", "temperature", "top_p", "seed", "system", "dtype"))
    loaded = load(_only(request.model, "chat"), dtype=request.dtype)
    if loaded.family == "bert":
        raise UserError("a BERT does not talk; megalite generate fills its masks in")
    torch.manual_seed(request.seed)
    messages = [{"role": "system", "content": request.system}] if request.system else []
    for line in lines:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = stream(loaded, _prompt_ids(loaded, messages), request)
        messages.append({"role": "assistant", "content": answer.strip() or "..."})


def _only(names: Sequence[str], verb: str) -> str:
    if len(names) != 1:
        raise UserError(f"megalite {verb} needs one model: megalite {verb} runs/NAME, a checkpoint, or a Hugging Face folder or name")
    return names[0]


def _prompts(request: Generation) -> list[str]:
    if request.file:
        try:
            found = Path(request.file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"--file {request.file} cannot be read ({problem}); give a text file with a prompt a line") from None
    else:
        found = list(request.prompt) or sys.stdin.read().splitlines()
    if not (found := [line for line in found if line.strip()]):
        raise UserError("no prompt: give --prompt TEXT, --file FILE, or lines on standard input")
    return found


def _encode(loaded: Loaded, prompt: str, request: Generation) -> list[int]:
    if request.chat:
        system = [{"role": "system", "content": request.system}] if request.system else []
        return _prompt_ids(loaded, [*system, {"role": "user", "content": prompt}])
    if loaded.config and loaded.config.task and loaded.config.task.kind == "translate":
        prompt = loaded.config.task.prompt.format(source=prompt)
    return loaded.tokenizer.encode_batch([prompt])[0].tolist()


def _prompt_ids(loaded: Loaded, messages: list[dict[str, str]]) -> list[int]:
    try:
        return chat.prompt(messages, loaded.tokenizer, template=chat.find_template(loaded.folder)).tolist()
    except chat.NoChat as problem:
        raise UserError(f"the conversation cannot be told to the model: {problem}") from None


def settings(loaded: Loaded, request: Generation) -> dict[str, Any]:
    """What transformers' `generate` is told."""
    special = loaded.tokenizer.special
    ends = [special["eos"]] if "eos" in special else []
    pieces = loaded.theirs.get_vocab()
    ends += [pieces[end] for end in ("<|im_end|>", "<|eot_id|>") if end in pieces]
    found: dict[str, Any] = {
        "max_new_tokens": request.tokens,
        "eos_token_id": ends or None,
        "pad_token_id": special.get("pad", special.get("eos", 0)),
    }
    if request.temperature == 0:
        return found | {"do_sample": False}
    return found | {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}


@torch.no_grad()
def write(loaded: Loaded, prompts: Sequence[Sequence[int]], request: Generation) -> list[list[str]]:
    """`number` answers to each prompt, prompts of like length together, padded on the left."""
    limit, pad = loaded.longest - request.tokens, settings(loaded, request)["pad_token_id"]
    if limit < 1:
        raise UserError(f"--tokens {request.tokens} leaves no room for a prompt: the model reads {loaded.longest}; lower --tokens")
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers: list[list[str]] = [[] for _ in prompts]
    for at in range(0, len(order), request.batch):
        places = order[at : at + request.batch]
        cut = [list(prompts[place])[-limit:] for place in places]
        size = max(map(len, cut))
        ids = torch.tensor([[pad] * (size - len(each)) + each for each in cut], device=loaded.device)
        mask = torch.tensor([[0] * (size - len(each)) + [1] * len(each) for each in cut], device=loaded.device)
        found = loaded.model.generate(ids, attention_mask=mask, num_return_sequences=request.number, **settings(loaded, request))
        for row, output in enumerate(found[:, size:].tolist()):
            answers[places[row // request.number]].append(_text(loaded, output))
    return answers


def _text(loaded: Loaded, ids: Sequence[int]) -> str:
    """Up to the first token that ends a text."""
    reserved = loaded.tokenizer.reserved
    end = next((place for place, number in enumerate(ids) if reserved[number]), len(ids))
    return loaded.tokenizer.decode(ids[:end])


@torch.no_grad()
def stream(loaded: Loaded, prompt: Sequence[int], request: Generation) -> str:
    """One answer, shown as it is written."""
    from megalite.convert.memory import streamer

    limit = loaded.longest - request.tokens
    if limit < 1:
        raise UserError(f"--tokens {request.tokens} leaves no room for a prompt: the model reads {loaded.longest}; lower --tokens")
    ids = torch.tensor([list(prompt)[-limit:]], device=loaded.device)
    mask = torch.ones_like(ids)
    found = loaded.model.generate(ids, attention_mask=mask, streamer=streamer(loaded), **settings(loaded, request))
    return _text(loaded, found[0, ids.shape[1] :].tolist())


@torch.no_grad()
def fill(loaded: Loaded, text: str, *, number: int) -> list[str]:
    """The text with its masks filled by the likeliest tokens, each mask by itself; `number` ranks of them, with probabilities."""
    mask = loaded.theirs.mask_token
    if mask not in text:
        raise UserError(f"{text!r} holds no {mask} to fill in; write it where a word is missing")
    special = loaded.tokenizer.special
    parts = [ids.tolist() for ids in loaded.tokenizer.encode_batch(text.split(mask))]
    ids = [special["cls"], *parts[0], *(token for part in parts[1:] for token in (special["mask"], *part)), special["sep"]]
    if len(ids) > loaded.longest:
        raise UserError(f"a prompt of {len(ids)} tokens is longer than the {loaded.longest} that the model reads; shorten it")
    batch = torch.tensor([ids], device=loaded.device)
    logits = loaded.model(batch).prediction_logits[0, batch[0] == special["mask"]].float()  # (masks, v)
    shares, tokens = logits.softmax(-1).topk(number)
    found = []
    for rank in range(number):
        chosen = [loaded.tokenizer.decode([int(token)]) for token in tokens[:, rank]]
        filled, *pieces = text.split(mask)
        filled += "".join(word + piece for word, piece in zip(chosen, pieces, strict=True))
        found.append(
            f"{filled}  ({', '.join(f'{word} {share:.2f}' for word, share in zip(chosen, shares[:, rank].tolist(), strict=True))})"
        )
    return found
