"""The demonstration: what the sentence claims, which examples are shown, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.config import Settings
from fedloom.experiment.demonstrating import (
    METHODS,
    Example,
    Share,
    choose_examples,
    demo_settings,
    demonstrate,
    read_table,
)
from fedloom.experiment.exact_match import AskedRow
from fedloom.reporting.progress import PlainProgress

Make = Callable[..., Settings]
CLOSE, FAR = Share(0.50, 0.45, 0.55, 400), Share(0.30, 0.26, 0.35, 400)


def asked(category: str, answer: str) -> AskedRow:
    return AskedRow(f"Question: which {category}?\nAnswer:", answer, {"category": category})


def test_the_sentence_names_the_best_federated_method_and_its_gain_over_the_base() -> None:
    said = read_table({"base": FAR, "flora": CLOSE, "fedit": FAR}, 3)
    assert said.startswith("After 3 rounds flora answers 50 % of 400 held-out questions word for word")
    assert (
        "the untouched base 30 %, a difference more than noise; its lead over fedit (30 %) is more than noise" in said
    )
    assert said.endswith("one seed, so another may order the methods otherwise.")


def test_a_gain_that_the_intervals_cover_is_called_noise() -> None:
    slightly = Share(0.47, 0.42, 0.52, 400)
    said = read_table({"base": slightly, "flora": CLOSE, "fedit": slightly, "zero-padding": FAR}, 3)
    assert "the untouched base 47 %, a difference within noise" in said
    assert "its lead over fedit (47 %) and zero-padding (30 %) is partly within noise" in said


def test_a_mean_over_models_is_told_and_not_judged() -> None:
    said = read_table({"base": FAR, "flora": CLOSE, "standalone": Share(0.2), "centralised": CLOSE}, 3)
    assert "a client alone gets to 20 % on average, all rows in one place to 50 %" in said


def test_examples_are_learned_answers_of_different_categories() -> None:
    rows = [asked("town", "a"), asked("town", "b"), asked("unit", "c"), asked("word", "d")]
    chosen = choose_examples(rows, ["x", "x", "x", "d"], ["a", "b", "c", "d"])
    assert [(one.expected, one.after) for one in chosen] == [("a", "a"), ("c", "c")]
    assert chosen[0].question == "Question: which town? / Answer:"


def test_what_is_still_wrong_fills_up_and_is_said_to_be_wrong() -> None:
    chosen = choose_examples([asked("town", "a"), asked("unit", "c")], ["x", "x"], ["a", ""])
    assert chosen[1] == Example("Question: which unit? / Answer:", "c", "x", "")
    assert chosen[1].lines()[2] == "    after:  (nothing)  (wrong)"


def test_the_shipped_recipe_is_offline_and_scores_exact_matches() -> None:
    settings = demo_settings()
    assert (settings.model.base, settings.data.path, settings.data.eval_path) == ("embedded",) * 3
    assert settings.evaluation.suites == ("exact-match",)
    assert len(set(settings.client_ranks)) > 1


def test_a_demonstration_runs_every_method_and_the_same_command_only_shows_it_again(
    settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, out = settings_for(evaluation__suites=["exact-match"], federation__num_rounds=1), tmp_path / "demo"
    first = demonstrate(out, settings=settings)
    assert sorted(entry.name for entry in out.iterdir() if entry.is_dir()) == sorted(f"{m}-seed1" for m in METHODS)
    assert list(first.table.cells) == list(METHODS)
    assert "<title>fedloom report" in first.report.read_text(encoding="utf-8")
    assert json.loads((out / "demo.json").read_text(encoding="utf-8"))["reading"] == first.reading
    assert first.reading in "\n".join(first.lines())
    again = demonstrate(out, settings=settings, progress=PlainProgress(sys.stderr))
    assert again.as_dict() == first.as_dict()
    assert "round 1/1" not in capsys.readouterr().err
