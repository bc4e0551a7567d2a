"""Runs put side by side: groups that differ by the seed only, their curves, their table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedloom.methods import table
from fedloom.reporting.budget import with_rows_trained
from fedloom.reporting.metrics import CLIENT_LOSS, LOSS, Metric, figures_of, metrics_among
from fedloom.reporting.tables import Comparison, compare
from fedloom.run_folder.manifest import flatten
from fedloom.run_folder.reader import StoredRun
from fedloom.wording import one_line, worded

_INDIVIDUAL = {"run.seed"}


@dataclass(frozen=True)
class RunGroup:
    """Runs of one method and one set of settings, one per seed, in the order of the seeds."""

    label: str
    colour: int
    runs: tuple[StoredRun, ...]

    @property
    def first(self) -> StoredRun:
        """The run of the lowest seed, shown where one run has to stand for the group."""
        return self.runs[0]


@dataclass(frozen=True)
class Curve:
    """A group's mean over seeds and the range the seeds span, at the x all of them have."""

    group: RunGroup
    xs: list[float]
    ys: list[float]
    low: list[float]
    high: list[float]


def group_runs(runs: Iterable[StoredRun]) -> list[RunGroup]:
    """Group runs: a label is the method's name, with the settings that distinguish equal names."""
    members: dict[str, list[StoredRun]] = {}
    for run in runs:
        settings = {name: value for name, value in flatten(run.config).items() if name not in _INDIVIDUAL}
        members.setdefault(repr((run.method, sorted(settings.items()))), []).append(run)
    groups = [sorted(same, key=lambda run: run.seed) for same in members.values()]
    groups.sort(key=lambda same: table.place(same[0].method))
    labels = _labels([same[0] for same in groups])
    return [
        RunGroup(label, colour, tuple(same)) for colour, (label, same) in enumerate(zip(labels, groups, strict=True))
    ]


def _labels(runs: Sequence[StoredRun]) -> list[str]:
    """Return labels that are all different: settings by their last name, in full where that is not enough, or counted.

    Tables and charts find a group by its label, so no label may mean two groups.
    """
    labels = [_label(run, runs, lambda name: name.rpartition(".")[2]) for run in runs]
    shared = Counter(labels)
    full = [_label(run, runs, str) if shared[label] > 1 else label for run, label in zip(runs, labels, strict=True)]
    times, given = Counter(full), Counter[str]()
    for index, label in enumerate(full):
        given[label] += 1
        full[index] = f"{label} #{given[label]}" if times[label] > 1 else label
    return full


def _label(run: StoredRun, runs: Sequence[StoredRun], called: Callable[[str], str]) -> str:
    same = [flatten(other.config) for other in runs if other.method == run.method]
    mine = flatten(run.config)
    shown = [
        f"{called(name)}={worded(mine[name])}"
        for name in mine
        if name not in _INDIVIDUAL and any(other.get(name) != mine[name] for other in same)
    ]
    return one_line(f"{run.method} ({', '.join(shown)})" if shown else run.method)


def curve(group: RunGroup, per_run: Mapping[int, Sequence[tuple[int, float, float]]]) -> Curve:
    """Return a group's curve from ``per_run[i]`` = (round, x, y) of run i: mean and range over the rounds all have."""
    points = [{n: (x, y) for n, x, y in rows} for rows in per_run.values()]
    rounds = sorted(set.intersection(*(set(one) for one in points))) if points else []
    at = [[one[n] for one in points] for n in rounds]
    return Curve(
        group,
        [statistics.fmean(x for x, _ in seeds) for seeds in at],
        [statistics.fmean(y for _, y in seeds) for seeds in at],
        [min(y for _, y in seeds) for seeds in at] if len(points) > 1 else [],
        [max(y for _, y in seeds) for seeds in at] if len(points) > 1 else [],
    )


def loss_by_round(group: RunGroup) -> Curve:
    """Return held-out loss against rounds."""
    return curve(group, {i: [(n, float(n), loss) for n, _, loss in _losses(run)] for i, run in enumerate(group.runs)})


def loss_by_bytes(group: RunGroup) -> Curve:
    """Return held-out loss against the bytes that crossed so far, both ways, over all clients."""
    return curve(group, {i: [(n, sent, loss) for n, sent, loss in _losses(run)] for i, run in enumerate(group.runs)})


def value_by_round(group: RunGroup, metric: Metric) -> Curve:
    """Return a figure of the records against rounds, leaving out rounds without it."""
    return curve(
        group,
        {
            i: [(r["round"], float(r["round"]), value) for r in run.records if (value := metric.of(r)) is not None]
            for i, run in enumerate(group.runs)
        },
    )


def rank_by_round(group: RunGroup) -> Curve:
    """Return the largest rank among the result's modules against rounds."""
    return curve(
        group,
        {
            i: [(r["round"], float(r["round"]), float(max(r["rank"].values()))) for r in run.records if r.get("rank")]
            for i, run in enumerate(group.runs)
        },
    )


def _losses(run: StoredRun) -> list[tuple[int, float, float]]:
    """Return (round, bytes so far, loss); of a finished run the untouched base's loss comes first, at round 0."""
    before = LOSS.of({"eval": (run.finished or {}).get("base_eval")})
    start = [] if before is None else [(0, 0.0, before)]
    sent = accumulate((r.get("upload_bytes") or 0) + (r.get("download_bytes") or 0) for r in run.records)
    return start + [
        (record["round"], float(total), loss)
        for record, total in zip(run.records, sent, strict=True)
        if (loss := LOSS.of(record)) is not None
    ]


def results(run: StoredRun) -> dict[str, float]:
    """Return a run's final figures by key: the last evaluation's numbers, and what the run cost."""
    return figures_of(_final_evaluation(run), with_rows_trained(run))


def _final_evaluation(run: StoredRun) -> Mapping[str, Any]:
    evaluations = run.evaluations()
    return (run.finished or {}).get("eval") or (evaluations[-1]["eval"] if evaluations else {})


def by_group(groups: Sequence[RunGroup]) -> dict[str, dict[str, dict[str, float]]]:
    """Return by figure, then by group of held-out rows (category, subject), every run group's final mean over seeds.

    The figures are the loss, of each suite the first metric, and by client the loss on its own rows; empty where
    nothing was reported by group.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group in groups:
        per_run = [_of_groups(_final_evaluation(run)) for run in group.runs]
        for figure in dict.fromkeys(name for one in per_run for name in one):
            having = [one[figure] for one in per_run if figure in one]
            for part in dict.fromkeys(name for one in having for name in one):
                mean = statistics.fmean(one[part] for one in having if part in one)
                found.setdefault(figure, {}).setdefault(part, {})[group.label] = mean
    return found


def _of_groups(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    losses = evaluation.get("loss_nats_of_group")
    suites = {
        f"{suite}.{next(iter(scores['metrics']))}": {name: one["value"] for name, one in scores["per_group"].items()}
        for suite, scores in evaluation.get("suites", {}).items()
        if "per_group" in scores
    }
    own = evaluation.get("clients", {}).get("loss_nats_of_client")
    by_client = {CLIENT_LOSS.key: dict(own)} if own else {}
    return ({"loss_nats": dict(losses)} if losses else {}) | suites | by_client


def result_table(groups: Sequence[RunGroup], reference: str | None = None) -> Comparison:
    """Return the table of every group's final figures over its seeds."""
    return table_of({group.label: group.runs for group in groups}, reference)


def table_of(runs: Mapping[str, Sequence[StoredRun]], reference: str | None = None) -> Comparison:
    """Return the table of final figures of runs by label, one run per seed; figures that no run has give no column."""
    found = {label: {run.seed: results(run) for run in seeds} for label, seeds in runs.items()}
    return compare(found, metrics_among(row for seeds in found.values() for row in seeds.values()), reference)


def client_entries(run: StoredRun) -> list[Mapping[str, Any]]:
    """Return each client's entry of the last round it took part in, by client."""
    latest = {entry["client"]: entry for record in run.records for entry in record.get("clients") or []}
    return [latest[client] for client in sorted(latest)]
