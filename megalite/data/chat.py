"""Conversations as tokens, by the tokenizer's own chat template, and which of them the assistant said.

In: messages [{"role": ..., "content": ...}], a tokenizer, its Jinja template (or None: a plain one).  Out: pieces of ids, each with
whether it is
the assistant's and so to be learned. What people wrote is data: a special token spelled out in a message stays text, while one that the
template writes is that token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.tokenizer import Tokenizer

PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MARK = "\ue000{}\ue001"  # stands for a message's content while the template works; private characters, which no text should hold
ROLES = ("system", "user", "assistant", "tool")


class NoChat(Exception):
    """Why something is no conversation."""


def check(messages: Any) -> list[dict[str, str]]:
    """Messages, or why they are none."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            raise NoChat("messages are no JSON") from None
    if not isinstance(messages, list) or not messages:
        raise NoChat("no messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise NoChat(f"a message needs a role ({', '.join(ROLES)}) and a content")
        if not message["content"].strip():
            raise NoChat("empty message")
    return messages


def encode(messages: Any, tokenizer: Tokenizer, *, template: str | None = None) -> list[tuple[np.ndarray, bool]]:
    """The whole conversation; raises NoChat where there is no turn of the assistant to learn."""
    messages = check(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise NoChat("no turn of the assistant")
    pieces: list[tuple[np.ndarray, bool]] = []
    before = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(messages[:number], tokenizer, template=template, ask=True)
        answered = render(messages[: number + 1], tokenizer, template=template)
        if not asked.startswith(before) or not answered.startswith(asked):
            raise NoChat("the chat template writes earlier turns anew with every turn, so the assistant's part cannot be told")
        end = asked + _own_part(answered.removeprefix(asked), tokenizer)
        pieces += [
            (_ids(asked.removeprefix(before), messages, tokenizer), False),
            (_ids(end.removeprefix(asked), messages, tokenizer), True),
        ]
        before = end
    return [piece for piece in pieces if len(piece[0])]


def prompt(messages: Any, tokenizer: Tokenizer, *, template: str | None = None) -> np.ndarray:
    """The conversation so far, up to where the assistant speaks next."""
    messages = check(messages)
    return _ids(render(messages, tokenizer, template=template, ask=True), messages, tokenizer)


def render(messages: Sequence[dict[str, str]], tokenizer: Tokenizer, *, template: str | None, ask: bool = False) -> str:
    """What the template makes of them, with marks for their contents."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise NoChat(f"the chat template refuses: {reason}")

    marked = [{**message, "content": MARK.format(number)} for number, message in enumerate(messages)]
    spelled = {f"{role}_token": tokenizer.decode([number]) for role, number in tokenizer.special.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        made = environment.from_string(template or PLAIN)
        return made.render(messages=marked, add_generation_prompt=ask, raise_exception=refuse, **spelled)
    except TemplateError as problem:
        raise NoChat(f"the chat template fails: {problem}") from None


def _own_part(answer: str, tokenizer: Tokenizer) -> str:
    """Of what the template writes for a turn of the assistant: up to the token that ends it; the line end behind is the template's."""
    ends = {tokenizer.decode([number]) for role, number in tokenizer.special.items() if role == "eos"} | {"<|im_end|>", "<|eot_id|>"}
    after = answer.index("\ue001") + 1 if "\ue001" in answer else 0
    places = [answer.index(end, after) + len(end) for end in ends if end in answer[after:]]
    return answer[: min(places)] if places else answer


def _ids(text: str, messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of rendered text: contents put back as data, special tokens of the template as themselves."""
    reserved = {tokenizer.decode([int(number)]): int(number) for number in np.flatnonzero(tokenizer.reserved)}
    splitter = re.compile("(" + "|".join(map(re.escape, sorted(filter(None, reserved), key=len, reverse=True))) + ")")
    found: list[np.ndarray] = []
    for at, part in enumerate(splitter.split(text)):
        if at % 2:
            found.append(np.array([reserved[part]], np.int64))
        elif part:
            filled = re.sub("\ue000(\\d+)\ue001", lambda match: messages[int(match[1])]["content"], part)
            found += [ids.astype(np.int64) for ids in tokenizer.encode_batch([filled])]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def find_template(folder: str | Path) -> str | None:
    """The chat template in a tokenizer's folder, where it has one."""
    path = Path(folder)
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text("utf-8")
    if (path / "tokenizer_config.json").is_file():
        found = json.loads((path / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
        return found if isinstance(found, str) else None
    return None
