"""Score a result, and its base beside it, by a suite of the papers or by tasks of lm-evaluation-harness."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from fedloom.config.conduct import SuiteName
from fedloom.data.encoding import Overlong
from fedloom.data.sources import Rows
from fedloom.errors import SettingsError
from fedloom.evaluation.choice.question_prompts import Answering
from fedloom.evaluation.decoding import OnProgress
from fedloom.evaluation.intervals import Difference, Estimate, paired_differences
from fedloom.evaluation.lm_harness import run_harness_tasks
from fedloom.evaluation.outputs_file import why_not_kept
from fedloom.results.held_out import BASE, TEXT, scored_inputs
from fedloom.results.judgement import model_identity
from fedloom.results.opened_result import OpenedResult
from fedloom.results.suite_runs import run_suite
from fedloom.results.suites import SuiteChoice, SuiteScores, suite_choice_of
from fedloom.run_folder.claim import EVALUATION
from fedloom.run_folder.durable import plain
from fedloom.wording import Displayed

Say = Callable[[str], None]
SECONDS_BETWEEN_NOTES = 5.0

_OF_ROWS = ("data", "shape", "template", "limit", "max_new_tokens")
APPLYING: Mapping[SuiteName, tuple[str, ...]] = {
    "e2e": ("data", "template", "limit", "beams", "max_new_tokens"),
    "mmlu": ("data", "shots", "limit", "answering"),
    "multiple-choice": ("data", "limit", "answering"),
    "exact-match": _OF_ROWS,
    "last-number": _OF_ROWS,
}
"""The options that change what a suite does."""
ROW_SUITES = ("exact-match", "last-number")
DECODED_SUITES = ("e2e", *ROW_SUITES)
OF_HARNESS = ("shots", "limit")
OF_LOSS = ("data", "shape", "template", "max_length", "overlong")
OF_TEXT = ("data", "shape")
_CLOSED = {"answering": Answering, "overlong": Overlong}


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; at most one of ``suite`` and ``tasks``, without both the held-out loss.

    What is None was not given: it is as in the run, else that setting's default; for tasks of the
    harness, as each task has it.

    Raises:
        SettingsError: the suite is unknown, or an option is given that would change nothing.
    """

    suite: str | None = None
    tasks: str | None = None
    data: str | None = None
    shape: str | None = None
    template: str | None = None
    max_length: int | None = None
    overlong: str | None = None
    shots: int | None = None
    limit: int | None = None
    beams: int | None = None
    answering: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.suite is not None and self.tasks is not None:
            raise SettingsError("expected --suite or --lm-eval, got both; drop one")
        if self.suite is not None and self.suite not in get_args(SuiteName):
            raise SettingsError(
                f"--suite: expected one of {', '.join(get_args(SuiteName))}, got {self.suite!r}; choose one of these"
            )
        what, applying = self._applying()
        given = [field.name for field in fields(self) if field.name not in ("suite", "tasks")]
        given = [name for name in given if getattr(self, name) is not None]
        if foreign := [name for name in given if name not in applying]:
            raise SettingsError(
                f"{what}: expected no option but {_options(applying)}, got {_options(foreign)}, "
                "which would be ignored; drop it"
            )
        for name, kind in _CLOSED.items():
            if name in given and getattr(self, name) not in list(kind):
                raise SettingsError(
                    f"--{name}: expected one of {', '.join(kind)}, got {getattr(self, name)!r}; choose one of these"
                )

    def of(self, *names: str) -> dict[str, Any]:
        """Return those of the options that were given."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _applying(self) -> tuple[str, tuple[str, ...]]:
        """Return what is measured, as a person would call it, and the options that apply to it."""
        if self.suite is not None:
            return f"--suite {self.suite}", APPLYING[cast(SuiteName, self.suite)]
        if self.tasks is not None:
            return "--lm-eval", OF_HARNESS
        if self.data is None:
            return "the loss on the run's own rows, without --data or --suite", ("data",)
        return ("--shape text", OF_TEXT) if self.shape == TEXT else ("the loss, without --suite", OF_LOSS)


@dataclass(frozen=True)
class ResultScores(Displayed):
    """The scores of every adapter of a result and of its base, by name, and by adapter its differences from the base.

    A difference is the adapter's score less the base's, paired over the same items.
    """

    path: Path
    scores: Mapping[str, SuiteScores]
    differences: Mapping[str, Mapping[str, Difference]]

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain values."""
        return {
            "result": str(self.path),
            "scores": {name: found.as_dict() for name, found in self.scores.items()},
            "differences_from_base": plain(dict(self.differences)),
        }

    def lines(self) -> list[str]:
        """Return the scores for people."""
        lines = [
            line for name, found in self.scores.items() for line in (f"{name}:", *(f"  {x}" for x in found.lines()))
        ]
        return lines + [
            f"{name} − {BASE}, {metric}: {difference}"
            for name, found in self.differences.items()
            for metric, difference in found.items()
        ]


def score_suite(opened: OpenedResult, suite: SuiteName, **options: Any) -> ResultScores:
    """Score every adapter of a result, and its base, by one of the papers' suites; ``options`` are those of ``Asked``.

    Raises:
        SettingsError: there is no such suite, or an option would change nothing.
        EvaluationError: as for :func:`score_result`.
    """
    known = {field.name for field in fields(Asked)} - {"suite", "tasks"}
    if unknown := sorted(options.keys() - known):
        raise SettingsError(
            f"score_suite: expected options from {', '.join(sorted(known))}, got {', '.join(unknown)}; remove it"
        )
    return score_result(opened, Asked(suite=suite, **options), lambda _: None)


def score_result(opened: OpenedResult, asked: Asked, say: Say) -> ResultScores:
    """Score the base and every adapter; what is decoded is kept in the run folder and resumed.

    Where the folder cannot be written, as another owner's, a note says so and nothing is kept. The harness keeps no
    item's score, so its tasks have no differences.

    Raises:
        EvaluationError: if the suite's files are absent or hold something else.
        DataError: if there are no rows to ask.
        MissingExtraError: if lm-evaluation-harness is not installed.
    """
    choice = _choice(opened, asked)
    rows = _held_out(opened) if asked.suite in ROW_SUITES and asked.suite not in choice.paths else None
    kept = _keeping(opened, say) if asked.suite in DECODED_SUITES else None
    scores = {}
    for name in (BASE, *opened.adapters):
        model = opened.use(None if name == BASE else name)
        say(f"scoring {name}")
        if asked.tasks is not None:
            scores[name] = _harness(model, opened, asked)
        else:
            scores[name] = _suite(model, opened, name, cast(SuiteName, asked.suite), choice, rows, kept, say)
    differences = {
        name: paired_differences(scores[name].items, scores[BASE].items, seed=choice.seed) for name in opened.adapters
    }
    return ResultScores(opened.found.path, scores, differences)


def _keeping(opened: OpenedResult, say: Say) -> Path | None:
    """Return where outputs are kept, if anywhere: in a run's folder, unless it cannot be written."""
    if opened.found.run is None:
        return None
    folder = opened.found.path / EVALUATION
    if (reason := why_not_kept(folder)) is not None:
        say(f"note: what is decoded is not kept, since nothing can be written in {folder}: {reason}")
        return None
    return folder


def _suite(
    model: Any,
    opened: OpenedResult,
    name: str,
    suite: SuiteName,
    choice: SuiteChoice,
    rows: Rows | None,
    kept: Path | None,
    say: Say,
) -> SuiteScores:
    identity = model_identity(opened, name)
    return run_suite(
        suite,
        model,
        opened.base.tokenizer,
        choice,
        rows=rows,
        outputs=None if kept is None else kept / f"{suite}-{identity[:12]}",
        model_id=identity,
        on_progress=_told(say, name),
    )


def _told(say: Say, name: str) -> OnProgress:
    """Return what says how far a model is, every few seconds."""
    last = time.monotonic()

    def told(done: int, total: int, seconds_left: float) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            say(f"{name}: {done:,} of {total:,}, {seconds_left:.0f} s left")

    return told


def _choice(opened: OpenedResult, asked: Asked) -> SuiteChoice:
    recipe = suite_choice_of(opened.settings)
    decoding = replace(recipe.decoding, **asked.of("max_new_tokens"))
    if asked.beams is not None:
        decoding = replace(decoding, num_beams=asked.beams)
    paths = {**recipe.paths, **({str(asked.suite): asked.data} if asked.data is not None else {})}
    columns = recipe.columns if asked.shape in (None, recipe.shape) else {}
    given = asked.of("shots", "limit", "answering", "template", "shape")
    return replace(recipe, decoding=decoding, paths=paths, columns=columns, **given)


def _held_out(opened: OpenedResult) -> Rows | None:
    inputs = scored_inputs(opened)
    return None if inputs is None else inputs.held_out_rows


def _harness(model: Any, opened: OpenedResult, asked: Asked) -> SuiteScores:
    tasks = [task.strip() for task in str(asked.tasks).split(",")]
    found = run_harness_tasks(model, opened.base.tokenizer, tasks, shots=asked.shots, limit=asked.limit)
    estimates: dict[str, Estimate] = {
        f"{task}.{metric}": estimate for task, metrics in found.metrics.items() for metric, estimate in metrics.items()
    }
    return SuiteScores("lm-eval", estimates, {"version": found.version, "shots": found.shots})


def _options(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
