"""Our checkpoints under EleutherAI's lm-evaluation-harness, by its own tasks and its own scores.

In: a checkpoint of ours on whatever mesh, names of tasks, or a folder with tasks of one's own.  Out: the harness's results. The model
is the transformers model that the checkpoint is exported to in memory, so that what is measured is what `megalite export` gives away. Needs
`pip install megalite[harness]`; tasks of the harness download their data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megalite.convert.memory import load
from megalite.errors import UserError


def measure(
    model: str, tasks: Sequence[str], *, folder: str | None = None, limit: int | None = None, batch: int = 8, shots: int | None = None
) -> dict[str, Any]:
    """{task: {score: value}}. `folder`: of task files; `limit`: documents of each task; `shots`: examples in front of each question."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--harness needs lm-evaluation-harness: pip install 'megalite[harness]'") from None
    loaded = load(model)
    if loaded.family == "bert":
        raise UserError("lm-evaluation-harness asks how likely a text is, which a BERT cannot say; begin from a GPT")
    known = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in known.all_tasks]:
        raise UserError(f"lm-evaluation-harness has no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give --harness-tasks FOLDER")
    harness: Any = lm_eval  # what it exports is made when it is asked for, which type checkers do not see
    make: Any = HFLM
    wrapped = make(
        pretrained=loaded.model,
        tokenizer=loaded.theirs,
        backend="causal",
        batch_size=batch,
        max_length=loaded.longest,
        device=str(loaded.device),
    )
    found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=known, log_samples=False)
    assert found is not None
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, (int, float))}
        for task, scores in found["results"].items()
    }
