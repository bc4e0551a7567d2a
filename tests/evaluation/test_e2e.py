from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedloom.errors import EvaluationError, MissingExtraError
from fedloom.evaluation.e2e import meteor
from fedloom.evaluation.e2e.bleu import bleu, bleu_and_nist_statistics
from fedloom.evaluation.e2e.e2e_files import matched_texts, read_outputs, read_references
from fedloom.evaluation.e2e.rouge import rouge_l
from fedloom.evaluation.e2e.scorer import METRICS, score_e2e
from fedloom.evaluation.e2e.tokenisers import mteval_words, ptb_words
from fedloom.evaluation.intervals import paired_differences

PYTHON_METRICS = ("BLEU", "NIST", "ROUGE_L", "CIDEr")
REFERENCES = [["the cat sat on the mat .", "a cat is on the mat ."], ["there is a dog here .", "a dog is here now ."]]

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")


def official_scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "official_scores.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.data
@pytest.mark.slow
def test_eight_systems_score_as_the_official_scorer_says(data_dir: Path) -> None:
    references = read_references(data_dir / "e2e" / "testset_w_refs.csv")
    assert (len(references), references.num_texts) == (630, 4693)
    systems = official_scores(data_dir / "e2e" / "system_outputs")
    assert len(systems) == 8
    for row in systems:
        outputs = matched_texts(references, read_outputs(data_dir / "e2e" / "system_outputs" / row["file"]))
        scores = score_e2e(references.texts, outputs, metrics=PYTHON_METRICS, resamples=2)
        got = {name: f"{scores.estimates[name].value:.4f}" for name in PYTHON_METRICS}
        assert got == {name: row[name] for name in PYTHON_METRICS}, row["file"]


@pytest.mark.data
@pytest.mark.extra("meteor")
@needs_java
def test_the_official_scorers_example_gives_its_five_figures(data_dir: Path) -> None:
    folder = data_dir / "e2e" / "example-inputs"
    references = read_references(folder / "devel-conc.txt")
    scores = score_e2e(references.texts, read_outputs(folder / "baseline-output.txt").texts, metrics=METRICS)
    assert [f"{scores.estimates[name].value:.4f}" for name in METRICS] == [
        "0.7203",
        "7.8212",
        "0.4801",
        "0.7910",
        "2.3039",
    ]


@pytest.mark.extra("meteor")
@needs_java
def test_meteor_resamples_with_the_formula_of_the_program() -> None:
    words = [[ptb_words(text) for text in texts] for texts in REFERENCES]
    outputs = [ptb_words("The cat sat on the mat."), ptb_words("A hound is here, running.")]
    statistics, value = meteor.meteor_statistics(words, outputs)
    assert float(meteor.meteor(statistics.sum(axis=0))) == pytest.approx(value, abs=1e-12)


def test_meteor_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"fedloom\[meteor\]"):
        score_e2e(REFERENCES, ["a", "b"], metrics=["METEOR"])
    scores = score_e2e(REFERENCES, ["a cat", "a dog"])
    assert set(scores.estimates) == set(PYTHON_METRICS)
    assert "fedloom[meteor]" in scores.absent["METEOR"]


@pytest.mark.extra("meteor")
@needs_java
def test_meteor_without_java_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor.shutil, "which", lambda _: None)
    with pytest.raises(EvaluationError, match="expected a Java runtime"):
        score_e2e(REFERENCES, ["a", "b"], metrics=["METEOR"])


def test_bleu_equals_sacrebleus() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu is the independent implementation")
    outputs = ["The cat sat on a mat, 3.5 times (twice).", "There is 1,000 dogs here now."]
    words = [[mteval_words(text) for text in texts] for texts in REFERENCES]
    ours = bleu(bleu_and_nist_statistics(words, [mteval_words(text) for text in outputs])[0].sum(axis=0))
    theirs = metrics.BLEU(lowercase=True, force=True).corpus_score(
        outputs, [list(texts) for texts in zip(*REFERENCES, strict=True)]
    )
    assert float(ours) == pytest.approx(theirs.score / 100, abs=1e-12)


def test_a_copy_of_a_reference_is_perfect_and_the_order_of_items_does_not_matter() -> None:
    outputs = [texts[0] for texts in REFERENCES]
    scores = score_e2e(REFERENCES, outputs, metrics=PYTHON_METRICS, resamples=5)
    assert scores.estimates["BLEU"].value == pytest.approx(1.0)
    assert scores.estimates["ROUGE_L"].value == pytest.approx(1.0)
    swapped = score_e2e(REFERENCES[::-1], outputs[::-1], metrics=PYTHON_METRICS, resamples=5)
    for name in PYTHON_METRICS:
        assert swapped.estimates[name].value == pytest.approx(scores.estimates[name].value, abs=1e-12)


def test_rouge_takes_its_two_maxima_from_different_references() -> None:
    references = [("a", "b"), ("a", "c", "d", "e")]
    precision, recall = 2 / 4, 2 / 2
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(references, ("a", "b", "x", "y")) == pytest.approx(expected)


def test_an_empty_output_scores_nothing_and_is_counted() -> None:
    scores = score_e2e(REFERENCES, ["", "there is a dog here ."], metrics=PYTHON_METRICS, resamples=3)
    assert scores.num_empty_outputs == 1
    assert scores.estimates["ROUGE_L"].value == pytest.approx(0.5)
    assert all(np.isfinite(estimate.value) for estimate in scores.estimates.values())


def test_the_better_system_wins_the_paired_comparison() -> None:
    references = [[f"there is a place called {name} near the river ."] for name in "abcdefghijkl"]
    good = [texts[0] for texts in references]
    bad = [text.replace("near the river", "somewhere") for text in good]
    first, second = (score_e2e(references, texts, metrics=PYTHON_METRICS) for texts in (good, bad))
    differences = paired_differences(first.items, second.items, seed=0)
    assert set(differences) == set(PYTHON_METRICS)
    for name, difference in differences.items():
        assert difference.exceeds_noise
        assert difference.value == pytest.approx(first.estimates[name].value - second.estimates[name].value)


@pytest.mark.parametrize(
    ("references", "outputs", "message"),
    [
        (REFERENCES, ["one"], "for each of 2 items, got 1"),
        (REFERENCES, ["", "  "], "expected an output with text, all 2 are empty"),
        ([["a"], []], ["a", "b"], "item 2: expected a reference, got none"),
    ],
)
def test_what_does_not_fit_is_refused(references: list[list[str]], outputs: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_e2e(references, outputs, metrics=PYTHON_METRICS)


def test_an_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(EvaluationError, match=r"metrics: expected names from .*, got \['bleu'\]"):
        score_e2e(REFERENCES, ["a", "b"], metrics=["bleu"])
