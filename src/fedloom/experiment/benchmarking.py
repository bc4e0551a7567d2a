"""Score a result, and its base beside it, by a suite of the papers or by tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fedloom.config.conduct import SuiteName
from fedloom.data.templates import AUTO
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import DecodingSettings
from fedloom.evaluation.intervals import Estimate
from fedloom.evaluation.lm_harness import run_harness_tasks
from fedloom.experiment.inputs import Workshop
from fedloom.experiment.judging import model_identity
from fedloom.experiment.measuring import BASE
from fedloom.experiment.results import OpenedResult
from fedloom.experiment.suites import SuiteChoice, SuiteScores, run_suite, suite_choice_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; one of ``suite`` and ``tasks``."""

    suite: str | None
    tasks: str | None
    data: str | None
    template: str | None
    shots: int
    limit: int | None
    beams: int
    answering: str


@dataclass(frozen=True)
class ResultScores:
    """The scores of every adapter of a result and of its base, by name."""

    path: Path
    scores: Mapping[str, SuiteScores]

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain values."""
        return {"result": str(self.path), "scores": {name: found.as_dict() for name, found in self.scores.items()}}

    def lines(self) -> list[str]:
        """Return the scores for people."""
        return [
            line for name, found in self.scores.items() for line in (f"{name}:", *(f"  {x}" for x in found.lines()))
        ]


def score_result(opened: OpenedResult, asked: Asked, say: Say) -> ResultScores:
    """Score the base and every adapter; what is decoded is kept in the run folder and resumed.

    Raises:
        EvaluationError: if the suite is unknown or its files are absent.
        MissingExtraError: if lm-evaluation-harness is not installed.
    """
    scores = {}
    for name in (BASE, *opened.adapters):
        model = opened.use(None if name == BASE else name)
        say(f"scoring {name}")
        if asked.tasks is not None:
            scores[name] = _harness(model, opened, asked)
        else:
            scores[name] = _suite(model, opened, name, asked, say)
    return ResultScores(opened.found.path, scores)


def _suite(model: Any, opened: OpenedResult, name: str, asked: Asked, say: Say) -> SuiteScores:
    suite = asked.suite
    if suite not in get_args(SuiteName):
        raise EvaluationError(f"--suite: expected one of {', '.join(get_args(SuiteName))}, got {suite!r}")

    def told(done: int, total: int, seconds_left: float) -> None:
        say(f"{name}: {done:,} of {total:,}, {seconds_left:.0f} s left")

    identity = model_identity(opened, name)
    kept = opened.found.path / "evaluation" / f"{suite}-{identity[:12]}.jsonl" if opened.found.run is not None else None
    return run_suite(
        suite,  # type: ignore[arg-type]
        model,
        opened.base.tokenizer,
        _choice(opened, suite, asked),
        rows=_held_out(opened) if suite == "exact-match" else None,
        outputs=kept,
        model_id=identity,
        on_progress=told,
    )


def _choice(opened: OpenedResult, suite: str | None, asked: Asked) -> SuiteChoice:
    base = SuiteChoice() if opened.settings is None else suite_choice_of(opened.settings)
    paths = {**base.paths, **({str(suite): asked.data} if asked.data is not None else {})}
    decoding: DecodingSettings = replace(base.decoding, num_beams=asked.beams)
    template = asked.template or base.template or AUTO
    return replace(
        base,
        paths=paths,
        shots=asked.shots,
        limit=asked.limit,
        decoding=decoding,
        template=template,
        answering=asked.answering,
    )


def _held_out(opened: OpenedResult) -> Any:
    if opened.settings is None:
        raise EvaluationError(
            f"{opened.found.path}: expected a run, whose held-out rows are known, got an adapter alone"
        )
    return Workshop().inputs(opened.settings, opened.base, opened.found.path / "partition.json").held_out_rows


def _harness(model: Any, opened: OpenedResult, asked: Asked) -> SuiteScores:
    tasks = [task.strip() for task in str(asked.tasks).split(",")]
    found = run_harness_tasks(model, opened.base.tokenizer, tasks, shots=asked.shots, limit=asked.limit)
    estimates: dict[str, Estimate] = {
        f"{task}.{metric}": estimate for task, metrics in found.metrics.items() for metric, estimate in metrics.items()
    }
    return SuiteScores("lm-eval", estimates, {"version": found.version, "shots": found.shots})
