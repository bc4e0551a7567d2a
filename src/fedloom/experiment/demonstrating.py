"""Every method on the embedded model and data: runs, a table, a sentence that reads it, examples, the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom import config, recipes
from fedloom.config import Settings
from fedloom.experiment.comparing import MethodsComparison, compare, suite_values
from fedloom.experiment.exact_match import METRIC, SUITE, AskedRow, answer_rows, asked_rows, is_match
from fedloom.experiment.inputs import Workshop
from fedloom.experiment.results import RESULT, OpenedResult, open_result
from fedloom.experiment.running import RunSummary
from fedloom.experiment.suites import SuiteChoice, suite_choice_of
from fedloom.reporting import durable
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.reporting.report import write_report
from fedloom.reporting.tables import Comparison, Metric
from fedloom.reporting.tables import compare as tabulate

RECIPE = "demo"
METHODS = ("base", "fedit", "zero-padding", "flora", "splitlora", "centralised", "standalone")
FEDERATED = ("fedit", "zero-padding", "flora")
SPLIT = "splitlora"
"""Told apart from the federated: its server trains too, so neither ranks nor bytes compare one to one."""
SHOWN = "flora"
"""The method whose answers are shown beside the base's."""
NUM_EXAMPLES = 2
REPORT = "report.html"
METRICS = (
    Metric("loss_nats", "held-out loss"),
    Metric(METRIC, "exact match", better="higher", unit="%"),
    Metric("upload_bytes", "bytes up", better="neither", unit="B"),
    Metric("download_bytes", "bytes down", better="neither", unit="B"),
    Metric("seconds", "time", better="neither", unit="s"),
)


@dataclass(frozen=True)
class Outcome:
    """A method's held-out loss and its share of questions answered, no bounds where it is a mean over models."""

    loss_nats: float
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Example:
    """A held-out question, the answer expected, and what the base and the result say."""

    question: str
    expected: str
    before: str
    after: str

    def lines(self) -> list[str]:
        """Return the example for people."""
        return [
            f"  {self.question}",
            f"    before: {self.before or '(nothing)'}",
            f"    after:  {self.after or '(nothing)'}" + ("" if is_match(self.after, self.expected) else "  (wrong)"),
        ]


@dataclass(frozen=True)
class Demonstration:
    """The runs, the table over them, what it says, and examples."""

    comparison: MethodsComparison
    table: Comparison
    reading: str
    examples: tuple[Example, ...]
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "folder": str(self.comparison.folder),
            "table": self.table.to_json(),
            "reading": self.reading,
            "examples": [asdict(example) for example in self.examples],
            "report": str(self.report),
            "runs": [run.as_dict() for run in self.comparison.runs],
        }

    def lines(self) -> list[str]:
        """Return everything for people."""
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.table.to_rich())
        examples = [line for example in self.examples for line in example.lines()]
        head = [f"Answers of the base, and after {SHOWN}:"] if examples else []
        return [
            *capture.get().rstrip().splitlines(),
            "",
            self.reading,
            "",
            *head,
            *examples,
            "",
            f"report: {self.report}",
        ]


def demo_settings() -> Settings:
    """Return the recipe that the demonstration runs."""
    return config.resolve(config.parse(recipes.read(RECIPE), f"{RECIPE}.toml"), f"recipe {RECIPE}")


def demonstrate(
    out: Path, *, settings: Settings | None = None, fresh: bool = False, progress: Progress | None = None
) -> Demonstration:
    """Run every method and control into ``out``, or go on with what is there, and show what came of it.

    ``settings`` are the shipped recipe's unless given; they need held-out rows and the suite ``exact-match``.

    Raises:
        FedloomError: ``out`` holds something else, or another recipe's runs.
    """
    settings, progress = settings or demo_settings(), progress or SilentProgress()
    seed = settings.run.seed
    progress.note(f"{len(METHODS)} runs: {', '.join(METHODS)}")
    comparison = compare(settings, METHODS, (seed,), out, fresh=fresh, progress=progress)
    table = tabulate({run.method: {seed: _figures(run)} for run in comparison.runs}, METRICS)
    reading = read_table({run.method: _outcome(run) for run in comparison.runs}, settings.federation.num_rounds)
    examples = find_examples(settings, out / f"{SHOWN}-seed{seed}")
    report = out / REPORT
    write_report([out], report)
    shown = Demonstration(comparison, table, reading, tuple(examples), report)
    durable.write_json(out / "demo.json", shown.as_dict())
    return shown


def read_table(outcomes: Mapping[str, Outcome], num_rounds: int) -> str:
    """Say in a sentence what the table shows, and what it does not.

    A gap between shares counts as more than noise when Newcombe's 95 % interval, from the two Wilson intervals,
    excludes zero. Both methods answer the same questions, which makes that interval too wide rather than too narrow.

    Source: Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10.
    """
    federated = [name for name in FEDERATED if name in outcomes]
    best, *others = sorted(federated, key=lambda name: outcomes[name].loss_nats)
    first, base = outcomes[best], outcomes["base"]
    parts = [
        f"After {num_rounds} rounds {best} has a held-out loss of {first.loss_nats:.2f} nats per token, the untouched "
        f"base {base.loss_nats:.2f}, and answers {_percent(first)} of {first.n} questions word for word, the base "
        f"{_percent(base)} ({_verdict(first, base)})"
    ]
    parts += [f"{name} has {_both(outcomes[name])} ({_verdict(first, outcomes[name])})" for name in others]
    parts += [_split_part(first, outcomes[SPLIT])] if SPLIT in outcomes else []
    controls = {"standalone": "a client alone {} on average", "centralised": "all rows in one place {}"}
    found = [text.format(_both(outcomes[name])) for name, text in controls.items() if name in outcomes]
    parts += [", ".join(found)] if found else []
    return "; ".join([*parts, "all of one seed, so another may order the methods otherwise."])


def _split_part(first: Outcome, split: Outcome) -> str:
    """Say what split training reached, which aggregates the lower half only and sends something else."""
    return (
        f"{SPLIT}, cut between clients and server and with activations among its bytes, has {_both(split)} "
        f"({_verdict(first, split)})"
    )


def find_examples(settings: Settings, folder: Path) -> list[Example]:
    """Return held-out questions that the result in ``folder`` answers and the base does not, one a category at first.

    Where there are too few such, questions that both get wrong fill up, and are shown as wrong.
    """
    opened = open_result(folder)
    held_out = Workshop().inputs(settings, opened.base).held_out_rows
    if held_out is None or not opened.adapters:
        return []
    choice = suite_choice_of(settings)
    asked = asked_rows(held_out, opened.base.tokenizer, choice, settings.data.shape, settings.data.columns)
    before, after = (_answers(opened, name, asked, choice) for name in (None, RESULT))
    return choose_examples(asked, before, after)


def choose_examples(asked: Sequence[AskedRow], before: Sequence[str], after: Sequence[str]) -> list[Example]:
    """Choose the learned ones, of categories not shown yet before others, then what is still wrong."""
    rows = list(zip(asked, before, after, strict=True))
    missed = [(one, b, a) for one, b, a in rows if not is_match(b, one.answer)]
    learned = [entry for entry in missed if is_match(entry[2], entry[0].answer)]
    wrong = [entry for entry in missed if entry not in learned]
    firsts: dict[Any, tuple[AskedRow, str, str]] = {}
    for entry in learned:
        firsts.setdefault(entry[0].row.get("category"), entry)
    ordered = _distinct([*firsts.values(), *learned, *wrong])
    return [Example(_question(one), one.answer, b, a) for one, b, a in ordered[:NUM_EXAMPLES]]


def _distinct(entries: Iterable[tuple[AskedRow, str, str]]) -> list[tuple[AskedRow, str, str]]:
    return list({id(entry[0]): entry for entry in entries}.values())


def _question(one: AskedRow) -> str:
    return " / ".join(part for part in one.prompt.splitlines() if part)


def _answers(opened: OpenedResult, name: str | None, asked: Sequence[AskedRow], choice: SuiteChoice) -> tuple[str, ...]:
    model = opened.use(name)
    return answer_rows(model, opened.base.tokenizer, asked, choice.decoding.max_new_tokens).outputs


def _figures(run: RunSummary) -> dict[str, float | None]:
    return {
        "loss_nats": run.eval.get("loss_nats"),
        METRIC: suite_values(run).get(f"{SUITE}.{METRIC}"),
        "upload_bytes": run.upload_bytes or None,
        "download_bytes": run.download_bytes or None,
        "seconds": run.seconds or None,
    }


def _outcome(run: RunSummary) -> Outcome:
    found = run.eval["suites"][SUITE]["metrics"][METRIC]
    return Outcome(run.eval["loss_nats"], found["value"], found.get("low"), found.get("high"), found.get("n"))


def _percent(outcome: Outcome) -> str:
    return f"{100 * outcome.value:.0f} %"


def _both(outcome: Outcome) -> str:
    return f"{outcome.loss_nats:.2f} and {_percent(outcome)}"


def _verdict(first: Outcome, second: Outcome) -> str:
    higher, lower = (first, second) if first.value >= second.value else (second, first)
    if higher.low is None or lower.high is None:
        return "not judged"
    noise = math.hypot(higher.value - higher.low, lower.high - lower.value)
    return "more than noise" if higher.value - lower.value > noise else "within noise"
