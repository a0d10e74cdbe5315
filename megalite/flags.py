"""Words of a command line as settings: `--mesh.tp 4` is {"mesh": {"tp": "4"}}.

In: words, and the pydantic schema whose fields are the flags.  Out: a nested mapping for it; pydantic gives the values their types.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from megalite.errors import UserError

SWITCH = {"true": True, "false": False, "none": None}  # what may stand behind a switch; none: where a setting may be left out


def read_flags(arguments: Sequence[str], schema: type[BaseModel], *, positional: str | None = None) -> dict[str, Any]:
    """Flags as a nested mapping for `schema`: `--mesh.tp 4` is {"mesh": {"tp": "4"}}; pydantic gives the values their types.

    A list takes every value up to the next flag (numbers also separated by commas); a switch takes none, or true or false, and
    `--section.no-switch` turns it off. Raises UserError for what is no flag, with the nearest one.
    """
    found: dict[str, Any] = {}
    known = dict(fields(schema))
    words = list(arguments)
    loose: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            loose.append(word)
            continue
        flag, given, value = word[2:].partition("=")
        path = flag.replace("-", "_")
        section, _, leaf = path.rpartition(".")
        off = leaf.startswith("no_") and path not in known
        if off:
            path = f"{section}.{leaf[3:]}" if section else leaf[3:]
        if path not in known or (off and known[path] is not bool):
            raise UserError(f"--{flag} is no flag{near(flag, [name.replace('_', '-') for name in known])}; --help lists them")
        values = [value] if given else []
        while words and not given and not words[0].startswith("--") and _takes(known[path], words[0], already=len(values)):
            values.append(words.pop(0))
        _put(found, path, _value(flag, known[path], values, off=off))
    if loose and positional is None:
        raise UserError(f"{loose[0]!r} is no flag and no value of one; flags begin with --")
    if positional is not None:
        found[positional] = [*found.get(positional, ()), *loose]
    return found


def fields(schema: type[BaseModel], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Dotted names and types of all settings; Optional is taken off. A section that may be left out is another verb's."""
    for name, field in schema.model_fields.items():
        kind: Any = field.annotation
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _many(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _takes(kind: Any, word: str, *, already: int) -> bool:
    """Whether a flag of this type that has `already` values takes this word as another one."""
    if kind is bool:  # anything else may be the next positional
        return not already and word.lower() in SWITCH
    return not already or _many(kind)


def _value(flag: str, kind: Any, values: list[str], *, off: bool) -> Any:
    if kind is bool:
        if values and values[0].lower() not in SWITCH:
            raise UserError(f"--{flag} = {values[0]!r}, but a switch is true or false; leave the value out for true")
        on = SWITCH[values[0].lower()] if values else True
        return on if on is None else on != off
    if _many(kind):
        return [part for value in values for part in ([value] if str in typing.get_args(kind) else value.split(","))]
    if not values:
        raise UserError(f"--{flag} needs a value")
    return None if values[0] == "None" else values[0]


def _put(into: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        into = into.setdefault(section, {})
    into[leaf] = value


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags of a run, which have a section (--mesh.tp 4), and the rest, each with its values."""
    run: list[str] = []
    rest: list[str] = []
    into = rest
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0]
            into = run if "." in name or name == "--deepspeed" else rest
        into.append(word)
    return run, rest


def near(wrong: str, known: list[str]) -> str:
    """The end of a message: what may have been meant, if anything is like it."""
    found = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean --{found[0]}?" if found and "." in wrong else f"; did you mean {found[0]}?" if found else ""
