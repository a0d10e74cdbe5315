"""Scores are those of the libraries that define them, and hold the figures that can be worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
import sklearn.metrics

from megalite.evaluate import scores

DRAW = random.Random(3)


def test_classification_is_scikit_learns() -> None:
    wanted, given = [DRAW.randrange(4) for _ in range(200)], [DRAW.randrange(4) for _ in range(200)]
    found = scores.classify(wanted, given, "abcd")
    assert found["accuracy"] == sklearn.metrics.accuracy_score(wanted, given)
    assert found["macro_f1"] == sklearn.metrics.f1_score(wanted, given, average="macro")
    assert found["micro_f1"] == sklearn.metrics.f1_score(wanted, given, average="micro")
    assert found["confusion"] == sklearn.metrics.confusion_matrix(wanted, given).tolist()


def test_a_confusion_matrix_has_a_row_for_a_label_that_never_occurs() -> None:
    found = scores.classify([0, 0, 2], [0, 2, 2], ("a", "b", "c"))
    assert found["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    page = scores.as_markdown(found, ("a", "b", "c"))
    assert "| accuracy | 0.6667 |" in page and "| a | 1 | 0 | 1 |" in page


def test_regression_is_scipys_and_a_constant_answer_scores_nothing() -> None:
    wanted = [DRAW.random() for _ in range(50)]
    given = [value + DRAW.random() for value in wanted]
    found = scores.regress(wanted, given)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(wanted, given)[0])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(wanted, given)[0])
    assert found["rmse"] == pytest.approx(float(np.sqrt(np.mean((np.array(wanted) - given) ** 2))))
    assert scores.regress(wanted, [1.0] * 50)["spearman"] == 0.0


def test_entities_are_seqevals_and_plain_tags_scikit_learns() -> None:
    tags = ["O", "B-X", "I-X", "B-Y"]
    wanted, given = ([[DRAW.choice(tags) for _ in range(9)] for _ in range(30)] for _ in range(2))
    found = scores.tag(wanted, given)
    assert found["f1"] == pytest.approx(seqeval.metrics.f1_score(wanted, given))
    assert found["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(wanted, given))
    plain = [[tag.replace("-", "") for tag in row] for row in wanted], [[tag.replace("-", "") for tag in row] for row in given]
    flat = [[tag for row in rows for tag in row] for rows in plain]
    assert scores.tag(*plain)["f1"] == pytest.approx(sklearn.metrics.f1_score(*flat, average="macro"))


def test_translation_is_sacrebleus_with_the_chinese_tokenizer_where_the_text_is_chinese() -> None:
    wanted, given = ["今天天气很好，我们去公园。", "他喜欢读书。"], ["今天天气好，我们去公园。", "他喜欢看书。"]  # noqa: RUF001
    found = scores.translate(wanted, given)
    assert found["bleu"] == sacrebleu.corpus_bleu(given, [wanted], tokenize="zh").score > 20
    assert found["chrf"] == sacrebleu.corpus_chrf(given, [wanted]).score
    assert found["tokenize"] == "zh" and scores.translate(["a b c d"], ["a b c d"])["tokenize"] == "13a"
    assert scores.translate(wanted, wanted)["bleu"] == pytest.approx(100)


def test_bits_a_byte_do_not_depend_on_the_tokens() -> None:
    found = scores.language(100 * math.log(2), tokens=50, size=200)
    assert found["bits_per_byte"] == pytest.approx(0.5) and found["perplexity"] == pytest.approx(4)
