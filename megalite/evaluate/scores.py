"""Scores of a task's predictions, by the libraries that define them: scikit-learn, SciPy, seqeval, sacreBLEU.

In: what should have been said and what was.  Out: numbers by name, higher is better but for "loss".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

Scores = dict[str, Any]


def classify(wanted: Sequence[int], given: Sequence[int], labels: Sequence[str]) -> Scores:
    """Accuracy, macro and micro F1 over the labels that occur, and the confusion matrix (row: wanted, column: given)."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    places = list(range(len(labels)))
    there = sorted(set(wanted) | set(given))
    return {
        "accuracy": float(accuracy_score(wanted, given)),
        "macro_f1": float(f1_score(wanted, given, labels=there, average="macro", zero_division=0.0)),  # type: ignore
        "micro_f1": float(f1_score(wanted, given, labels=there, average="micro", zero_division=0.0)),  # type: ignore
        "confusion": confusion_matrix(wanted, given, labels=places).tolist(),
    }


def regress(wanted: Sequence[float], given: Sequence[float]) -> Scores:
    """Pearson and Spearman correlation (0 where one side is constant), and the root of the mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {"pearson": float(pearsonr(wanted, given)[0]), "spearman": float(spearmanr(wanted, given)[0])}  # type: ignore[arg-type]
    error = math.sqrt(float(np.mean((np.array(wanted) - np.array(given)) ** 2)))
    return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()} | {"rmse": error}


def tag(wanted: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> Scores:
    """Accuracy of the words; F1, precision and recall of the entities that B- and I- tags mark (seqeval), or of the words where none do."""
    ours, theirs = [tag for tags in wanted for tag in tags], [tag for tags in given for tag in tags]
    accuracy = float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)]))
    if any(tag.startswith(("B-", "I-")) for tag in ours):
        from seqeval.metrics import f1_score, precision_score, recall_score

        lists = [list(tags) for tags in wanted], [list(tags) for tags in given]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: dict[str, Any] = {"f1": f1_score(*lists), "precision": precision_score(*lists), "recall": recall_score(*lists)}
        return {"accuracy": accuracy, **{name: float(score) for name, score in found.items()}}
    from sklearn.metrics import f1_score as word_f1

    return {"accuracy": accuracy, "f1": float(word_f1(ours, theirs, average="macro", zero_division=0.0))}  # type: ignore


def translate(wanted: Sequence[str], given: Sequence[str]) -> Scores:
    """BLEU, words of Chinese text cut by sacreBLEU's zh tokenizer and of other text by its 13a, and chrF."""
    import sacrebleu

    chinese = sum("\u4e00" <= character <= "\u9fff" for text in wanted for character in text) > 0.2 * sum(map(len, wanted))
    bleu = sacrebleu.corpus_bleu(list(given), [list(wanted)], tokenize="zh" if chinese else "13a")
    return {"bleu": bleu.score, "chrf": sacrebleu.corpus_chrf(list(given), [list(wanted)]).score, "tokenize": "zh" if chinese else "13a"}


def language(nats: float, tokens: int, size: int) -> Scores:
    """Perplexity of a token, and bits a byte of text, which can be compared between tokenizers."""
    bits = nats / math.log(2) / max(size, 1)
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": bits,
        "tokens": tokens,
        "bytes": size,
    }


def as_markdown(scores: Scores, labels: Sequence[str] = ()) -> str:
    """A table of the numbers, and the confusion matrix where there is one."""
    lines = ["| score | |", "|---|---|"]
    for name, value in scores.items():
        if not isinstance(value, list):
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            lines.append(f"| {name} | {shown} |")
    if matrix := scores.get("confusion"):
        names = [str(label).replace("|", "\\|") for label in labels]
        lines += ["", "| wanted, given | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in zip(names, matrix, strict=True)]
    return "\n".join([*lines, ""])
