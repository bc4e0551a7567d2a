"""Every method on the embedded model and data: runs, a table, a sentence that reads it, examples, the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom import config, recipes
from fedloom.assembly.inputs import Workshop
from fedloom.config import Settings
from fedloom.errors import EvaluationError
from fedloom.evaluation.exact_match import METRIC, is_match, score_matches
from fedloom.evaluation.intervals import ItemStatistics, paired_differences
from fedloom.experiment.comparison import MethodsComparison, compare
from fedloom.experiment.run_summary import RunSummary
from fedloom.file_formats import COMPARISON
from fedloom.methods import table as methods_table
from fedloom.models.causal import end_ids
from fedloom.reporting.metrics import LOSS
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.reporting.report import write_report
from fedloom.reporting.tables import Comparison
from fedloom.results.exact_answers import SUITE, AskedRow, asked_rows, kept_outputs
from fedloom.results.state_scores import outputs_stem
from fedloom.results.suites import suite_choice_of
from fedloom.run_folder import durable
from fedloom.run_folder.claim import EVALUATION
from fedloom.run_folder.manifest import read_manifest
from fedloom.run_folder.run_date import date_of
from fedloom.wording import counted

RECIPE = "demo"
STANDARD = methods_table.shipped("is_standard")
BASE = next(name for name in STANDARD if not methods_table.traits_of(name).is_trained)
METHODS = (BASE, *(name for name in STANDARD if name != BASE))
SHOWN = methods_table.EXACT
"""The method whose answers are shown beside the base's."""
NUM_EXAMPLES = 2
REPORT = "report.html"
COLUMNS = (LOSS.key, f"{SUITE}.{METRIC}", "upload_bytes", "download_bytes", "seconds")


@dataclass(frozen=True)
class Outcome:
    """A method's held-out loss, and which questions it answers; where it is a mean over models, only their share."""

    loss_nats: float
    share: float
    items: ItemStatistics | None = field(default=None, repr=False)

    @classmethod
    def of(cls, loss_nats: float, outputs: Sequence[str], asked: Sequence[AskedRow]) -> Outcome:
        """Return the outcome of one model, from its outputs."""
        found = score_matches(outputs, [one.answer for one in asked])
        return cls(loss_nats, found.accuracy.value, found.items[METRIC])


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
        console = Console(width=100, color_system=None)
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
    """Run every method and control into ``out``, or resume an interrupted demo there, and show the result.

    ``settings`` are the shipped recipe's unless given; they need held-out rows and the suite ``exact-match``.

    Raises:
        FedloomError: ``out`` holds something else, or another recipe's runs.
    """
    settings, progress = settings or demo_settings(), progress or SilentProgress()
    seed = settings.run.seed
    progress.note(f"{len(METHODS)} runs: {', '.join(METHODS)}")
    comparison = compare(settings, METHODS, (seed,), out, fresh=fresh, progress=progress)
    asked, outputs = answers_of(settings, comparison.runs)
    outcomes = {run.method: _outcome(run, asked, outputs) for run in comparison.runs}
    reading = read_table(outcomes, len(asked), settings)
    examples = choose_examples(asked, outputs[BASE], outputs[SHOWN])
    report = out / REPORT
    write_report([out], report)
    shown = Demonstration(comparison, comparison.table.only(*COLUMNS), reading, tuple(examples), report)
    durable.write_json(out / "demo.json", {"format_version": COMPARISON.number, **shown.as_dict()})
    return shown


def answers_of(settings: Settings, runs: Sequence[RunSummary]) -> tuple[list[AskedRow], dict[str, tuple[str, ...]]]:
    """Return the held-out questions and, by method, what its model answers after the last round, as its run kept it."""
    settings = settings.on(date_of(read_manifest(runs[0].folder)))
    workshop, choice = Workshop(), suite_choice_of(settings)
    base, _ = workshop.base(settings)
    held_out = workshop.inputs(settings, base).held_out_rows
    if held_out is None:
        raise EvaluationError("expected held-out rows to ask, got none; set data.eval_path or data.eval_rows")
    asked = asked_rows(held_out, base.tokenizer, choice, end_ids(base.model))
    single = [run for run in runs if "num_models" not in run.eval["suites"][SUITE]]
    stems = {run.method: outputs_stem(run.folder / EVALUATION, SUITE, run.num_rounds) for run in single}
    return asked, {name: kept_outputs(stem, base.tokenizer, asked, choice) for name, stem in stems.items()}


def read_table(outcomes: Mapping[str, Outcome], num_questions: int, settings: Settings) -> str:
    """Say in a sentence what the table shows, and what it does not.

    A gap between shares counts as more than noise when the 95 % interval of the paired bootstrap over the questions
    excludes zero.
    """
    num_rounds, seed = settings.federation.num_rounds, settings.run.seed
    federated = [name for name in methods_table.shipped("aggregates") if name in outcomes]
    best, *others = sorted(federated, key=lambda name: outcomes[name].loss_nats)
    first, base = outcomes[best], outcomes[BASE]
    parts = [
        f"After {counted(num_rounds, 'round')} {best} has a held-out loss of {first.loss_nats:.2f} nats per token, the "
        f"untouched base {base.loss_nats:.2f}, and answers {_percent(first)} of {num_questions} questions word for "
        f"word, the base {_percent(base)} ({_verdict(base, first, best, seed)})"
    ]
    parts += [f"{name} has {_both(outcomes[name])} ({_verdict(outcomes[name], first, best, seed)})" for name in others]
    # Told apart from the federated: its server trains too, so neither ranks nor bytes compare one to one.
    for name in methods_table.shipped("is_cut"):
        if split := outcomes.get(name):
            told = f"{name}, cut between clients and server and with activations among its bytes, has {_both(split)}"
            parts.append(f"{told} ({_verdict(split, first, best, seed)})")
    controls = reversed(methods_table.shipped("is_control"))
    found = [_control(name, outcomes[name]) for name in controls if name in outcomes]
    parts += [", ".join(found)] if found else []
    return "; ".join([*parts, "all from one seed; another may order the methods differently."])


def choose_examples(asked: Sequence[AskedRow], before: Sequence[str], after: Sequence[str]) -> list[Example]:
    """Choose questions answered after and not before, of categories not shown yet before others.

    Where there are too few, questions that are still wrong fill up, and are shown as wrong.
    """
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


def _outcome(run: RunSummary, asked: Sequence[AskedRow], outputs: Mapping[str, Sequence[str]]) -> Outcome:
    if run.method in outputs:
        return Outcome.of(run.eval["loss_nats"], outputs[run.method], asked)
    return Outcome(run.eval["loss_nats"], run.eval["suites"][SUITE]["metrics"][METRIC]["value"])


def _percent(outcome: Outcome) -> str:
    return f"{100 * outcome.share:.0f} %"


def _control(name: str, outcome: Outcome) -> str:
    if methods_table.traits_of(name).pools_rows:
        return f"all rows in one place {_both(outcome)}"
    return f"a client alone {_both(outcome)} on average"


def _both(outcome: Outcome) -> str:
    return f"{outcome.loss_nats:.2f} and {_percent(outcome)}"


def _verdict(outcome: Outcome, best: Outcome, name: str, seed: int) -> str:
    """Say where an outcome's share stands against that of the method ``name``."""
    if outcome.items is None or best.items is None:
        return "not judged"
    found = paired_differences({METRIC: outcome.items}, {METRIC: best.items}, seed=seed)[METRIC]
    if not found.is_judged:
        return "not judged"
    if not found.exceeds_noise:
        return f"within noise of {name}"
    return f"{'above' if found.value > 0 else 'below'} {name} by more than noise"
