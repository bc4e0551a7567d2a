"""The demonstration: what the sentence claims, which examples are shown, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom import config, embedded
from fedloom.config import Settings
from fedloom.data.token_rows import PromptTokens
from fedloom.experiment.demo import (
    METHODS,
    Example,
    Outcome,
    choose_examples,
    demo_settings,
    demonstrate,
    read_table,
)
from fedloom.reporting.progress import PlainProgress
from fedloom.results.exact_answers import AskedRow

Make = Callable[..., Settings]
ROWS = [AskedRow(PromptTokens(f"{number}?", ()), "yes", {}) for number in range(400)]


def outcome(loss_nats: float, num_right: int, start: int = 0) -> Outcome:
    """Return the outcome of a model that answers ``num_right`` questions, beginning with question ``start``."""
    outputs = ["yes" if start <= number < start + num_right else "no" for number in range(400)]
    return Outcome.of(loss_nats, outputs, ROWS)


GOOD, POOR = outcome(1.5, 200), outcome(3.0, 120)


def asked(category: str, answer: str) -> AskedRow:
    return AskedRow(PromptTokens(f"Question: which {category}?\nAnswer:", ()), answer, {"category": category})


def read(outcomes: dict[str, Outcome]) -> str:
    return read_table(outcomes, 400, demo_settings())


def test_the_sentence_names_the_federated_method_of_the_lowest_loss_and_judges_its_answers() -> None:
    said = read({"base": POOR, "fedit": POOR, "flora": GOOD})
    assert said == (
        "After 6 rounds flora has a held-out loss of 1.50 nats per token, the untouched base 3.00, and answers 50 % of "
        "400 questions word for word, the base 30 % (below flora by more than noise); fedit has 3.00 and 30 % "
        "(below flora by more than noise); all from one seed; another may order the methods differently."
    )


@pytest.mark.parametrize(("start", "verdict"), [(0, "above flora by more than noise"), (100, "within noise of flora")])
def test_the_same_gap_is_noise_or_not_by_the_questions_it_is_made_of(start: int, verdict: str) -> None:
    said = read({"base": POOR, "flora": GOOD, "fedit": outcome(2.0, 212, start)})
    assert f"fedit has 2.00 and 53 % ({verdict})" in said


def test_a_mean_over_models_is_told_and_not_judged() -> None:
    said = read({"base": POOR, "flora": GOOD, "standalone": Outcome(4.0, 0.2), "centralised": GOOD})
    assert "a client alone 4.00 and 20 % on average, all rows in one place 1.50 and 50 %" in said


def test_split_training_is_judged_apart_from_the_federated_methods() -> None:
    said = read({"base": POOR, "flora": outcome(2.0, 200), "splitlora": GOOD})
    assert said.startswith("After 6 rounds flora has a held-out loss of 2.00")
    assert (
        "; splitlora, cut between clients and server and with activations among its bytes, has 1.50 and 50 % "
        "(within noise of flora); " in said
    )


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


def test_the_shipped_recipe_cuts_the_base_in_the_middle_and_gives_split_training_the_others_budget() -> None:
    split = config.with_method(demo_settings(), "splitlora").split
    mean_rank = config.with_method(demo_settings(), "fedit").method.ranks
    blocks = json.loads((embedded.model_path() / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    assert split.cut_layer == blocks / 2
    assert split.client_rank == split.server_rank == mean_rank
    assert split.aggregate_every == demo_settings().training.local_steps


def test_every_run_of_the_shipped_recipe_is_valid() -> None:
    for method in METHODS:
        config.check(config.with_method(demo_settings(), method))


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
