"""`megalite verify` says yes to every recipe on every mesh that the README names. `make verify` runs all of it, `make test` a part."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megalite import config
from megalite.config import Config
from megalite.flags import read_flags
from megalite.tune.verify import verify

README = (Path(__file__).parents[2] / "README.md").read_text()
MESHES = [shlex.split(flags) for flags in re.findall(r"^\|[^|]*\| `(--mesh[^`]*)` \|$", README, flags=re.MULTILINE)]
OFTEN = {("gpt-7b", 5), ("bert-large", 4)}  # both kinds of model on the largest meshes


def _cases() -> list:
    return [
        pytest.param(
            recipe, flags, marks=pytest.mark.long if (recipe, number) in OFTEN else pytest.mark.slow, id=f"{recipe}-{'-'.join(flags)}"
        )
        for recipe in config.recipes()
        for number, flags in enumerate(MESHES)
    ]


def test_the_readme_names_meshes_of_every_axis() -> None:
    assert len(MESHES) == 6
    assert all(any(f"--mesh.{axis}" in flags for flags in MESHES) for axis in ("dp", "pp", "cp", "tp"))


@pytest.mark.parametrize(("recipe", "flags"), _cases())
def test_a_recipe_computes_what_one_process_computes(recipe: str, flags: list[str]) -> None:
    """Exactly these axes, under the recipe's own ZeRO stage and precision."""
    asked = read_flags(flags, Config)
    asked["mesh"] = {"dp": 1, "pp": 1, "cp": 1, "tp": 1, **asked["mesh"]}
    assert verify(config.load(recipe, overrides=asked)) == 0
