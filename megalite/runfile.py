"""Run files and recipes as they are written: nested settings, not checked yet.

In: a recipe's name or a path.  Out: a mapping; flags are merged on top of it, and `config.parse` checks what comes of that. `explain` says
in one line what is wrong with one.
"""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megalite.errors import UserError

RECIPES = resources.files("megalite") / "recipes"


def recipes() -> list[str]:
    """Names of the recipes that come with megalite."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def read(name: str) -> dict[str, Any]:
    """What a recipe or run file says, not checked yet."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"run file {name} does not exist; name a recipe ({', '.join(recipes())}) or an existing .yaml file")
        source: Traversable = path
    elif name in recipes():
        source = RECIPES / f"{name}.yaml"
    else:
        raise UserError(f"no recipe is called {name!r}{suggest(name, recipes())}; the recipes are {', '.join(recipes())}")
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{name} holds a {type(document).__name__}, but a run is a mapping of sections; see the recipes for examples")
    return {"name": path.stem, **document}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, `above` on top."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, dict) and (under is None or isinstance(under, dict)):
            merged[key] = merge(under or {}, value)
        elif not isinstance(value, dict):
            merged[key] = value  # else the file has no section there, and `parse` says so
    return merged


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Pydantic's findings as one line, unknown keys with the nearest known one."""
    found = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            section: Any = schema
            for part in detail["loc"][:-1]:
                kind = section.model_fields[part].annotation
                section = next((each for each in get_args(kind) if hasattr(each, "model_fields")), kind)  # `Section | None`
            found.append(f"{path} is no setting{suggest(str(detail['loc'][-1]), list(section.model_fields))}")
        elif isinstance(reason := detail.get("ctx", {}).get("error"), UserError):
            found.append(str(reason))
        elif detail["type"] == "missing":
            found.append(f"{path} is missing")
        else:
            found.append(f"{path} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}")
    return "; ".join(found)


def suggest(wrong: str, known: list[str]) -> str:
    """The nearest known name, as the end of an error message; nothing where none is near."""
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
