"""Run several methods over several seeds on the same data at the same budget, into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.assembly.inputs import Workshop
from fedloom.config import Settings, every_variant
from fedloom.errors import RunError
from fedloom.experiment.session import RunSummary, run
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.reporting.tables import Comparison, Metric, reference_among
from fedloom.reporting.tables import compare as tabulate
from fedloom.run_folder import durable

FILES = ("comparison.json", "demo.json")
METRICS = (
    Metric("loss_nats", "held-out loss"),
    Metric("perplexity", "perplexity", digits=2),
    Metric("aggregation_noise", "noise, last round", better="neither"),
    Metric("upload_bytes", "bytes up", unit="B"),
    Metric("download_bytes", "bytes down", unit="B"),
    Metric("seconds", "time", unit="s"),
)


@dataclass(frozen=True)
class MethodsComparison:
    """Every run of a comparison, and the table over them."""

    folder: Path
    runs: tuple[RunSummary, ...]
    table: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return runs and table as plain values."""
        return {"folder": str(self.folder), "table": self.table.to_json(), "runs": [r.as_dict() for r in self.runs]}

    def lines(self) -> list[str]:
        """Return the table for people."""
        console = Console(width=150, color_system=None)
        with console.capture() as capture:
            console.print(self.table.to_rich())
        return capture.get().rstrip().splitlines()


def compare(
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path | str,
    *,
    reference: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> MethodsComparison:
    """Run every method with every seed into ``out/<method>-seed<k>/`` and tabulate them.

    Runs that are complete are not run again, so a comparison resumes and grows by methods and seeds. The table sets
    each method against ``reference``, by default FedIT where it is one of several.

    Raises:
        SettingsError: a method or seed does not exist or comes twice, or a variant is not valid; nothing was run.
        EvaluationError: ``reference`` is not among the methods; nothing was run.
        RunError: ``out`` is a run, or holds another's comparison.json; nothing was touched.
        FedloomError: as for :func:`run`.
    """
    variants = every_variant(settings, methods, seeds)
    reference = reference_among(methods, reference)
    refuse_other_folder(Path(out))
    out, progress = Path(out), progress or SilentProgress()
    workshop = Workshop(progress)
    runs: list[RunSummary] = []
    for variant in variants:
        method, seed = variant.method.name, variant.run.seed
        progress.note(f"run {len(runs) + 1} of {len(variants)}: {method}, seed {seed}")
        runs.append(run(variant, out / f"{method}-seed{seed}", fresh=fresh, progress=progress, workshop=workshop))
    table = tabulate(_by_method(runs), (*METRICS[:2], *suite_metrics(runs), *METRICS[2:]), reference)
    result = MethodsComparison(out, tuple(runs), table)
    durable.write_json(out / "comparison.json", result.as_dict())
    return result


def refuse_other_folder(out: Path) -> None:
    """Check that ``out`` can hold a comparison: it is no run, and what lies in the way of its files is its own.

    Raises:
        RunError: it cannot; nothing was touched.
    """
    if (out / "manifest.json").exists():
        raise RunError(f"{out} is a run: expected a folder for several runs; choose another --out")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: expected a folder for several runs; choose another --out")
    for name in FILES:
        if not (out / name).exists():
            continue
        try:
            there = durable.read_json(out / name)
        except RunError:
            there = None
        if not isinstance(there, dict) or not {"folder", "table", "runs"} <= there.keys():
            raise RunError(f"{out / name} is not fedloom's and would be replaced: choose another --out")


def suite_metrics(runs: Sequence[RunSummary]) -> list[Metric]:
    """Return a column for every score of every suite that a run has."""
    names = dict.fromkeys(name for summary in runs for name in suite_values(summary))
    return [Metric(name, name.partition(".")[2].replace("_", " "), better="higher", digits=4) for name in names]


def suite_values(summary: RunSummary) -> dict[str, float]:
    """Return a run's scores by ``suite.metric``."""
    suites = summary.eval.get("suites", {})
    return {
        f"{suite}.{name}": found["value"]
        for suite, scores in suites.items()
        for name, found in scores["metrics"].items()
    }


def _by_method(runs: Sequence[RunSummary]) -> dict[str, dict[int, Mapping[str, float | None]]]:
    results: dict[str, dict[int, Mapping[str, float | None]]] = {}
    for summary in runs:
        results.setdefault(summary.method, {})[summary.seed] = {
            "loss_nats": summary.eval.get("loss_nats"),
            "perplexity": summary.eval.get("perplexity"),
            "aggregation_noise": summary.aggregation_noise,
            "upload_bytes": summary.upload_bytes or None,
            "download_bytes": summary.download_bytes or None,
            "seconds": summary.seconds or None,
            **suite_values(summary),
        }
    return results
