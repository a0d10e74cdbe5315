"""Fine-tuning on a mesh against one process: every head on dp x pp x tp under ZeRO-3, with samples that do not count alike."""

from __future__ import annotations

import itertools

import pytest
from compare import assert_same, config_of, on_mesh, reference

from megalite.config import Config

MESHES = {"dp2 pp2": (2, 2, 1), "dp2 tp2": (2, 1, 2), "pp2 tp2": (1, 2, 2)}
HEADS = ("classify", "regress", "tag")
STYLES = {"bert": "gpt2", "gpt": "llama"}


def with_head(head: str, *, family: str, style: str = "gpt2", mesh: tuple[int, int, int] = (1, 1, 1), dropout: float = 0.0) -> Config:
    dp, pp, tp = mesh
    config = config_of(family=family, style=style, dp=dp, pp=pp, tp=tp)
    model = config.model.model_copy(update={"head": head, "labels": 1 if head == "regress" else 5, "dropout": dropout})
    return config.model_copy(update={"model": model})


def _cases() -> list:
    """Every head and every mesh once, the families in turn; the triples that this leaves out are slow."""
    cases = []
    for (row, mesh), (column, head), (depth, family) in itertools.product(enumerate(MESHES), enumerate(HEADS), enumerate(STYLES)):
        quick = row == column and depth == column % 2
        cases.append(pytest.param(mesh, head, family, marks=() if quick else (pytest.mark.slow,)))
    return cases


@pytest.mark.parametrize(("mesh", "head", "family"), _cases())
def test_a_head_trains_on_a_mesh_as_in_one_process(mesh: str, head: str, family: str) -> None:
    config = with_head(head, family=family, style=STYLES[family], mesh=MESHES[mesh])
    assert_same(on_mesh(config, zero=3), reference(config), tied={})


def test_dropout_in_front_of_a_head_is_the_same_too() -> None:
    config = with_head("classify", family="bert", mesh=(2, 2, 1), dropout=0.2)
    ours, plain = on_mesh(config, zero=3), reference(config)
    assert_same(ours, plain, tied={})
    assert abs(plain[0].loss - reference(with_head("classify", family="bert"))[0].loss) > 1e-4, "nothing was dropped"
