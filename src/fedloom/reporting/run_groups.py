"""Runs put side by side: groups that differ by the seed only, their curves, their table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedloom.methods import table
from fedloom.reporting.ledger import total_cost
from fedloom.reporting.tables import Better, Comparison, Metric, compare
from fedloom.run_folder.manifest import flatten
from fedloom.run_folder.reader import StoredRun
from fedloom.wording import Unit

_INDIVIDUAL = {"run.seed"}
_HIGHER = ("exact", "accuracy", "bleu", "nist", "meteor", "rouge", "cider", "win")
_SHARES = ("exact", "accuracy")
_COUNTS = ("num_", "seconds")
_SPREADS = ("loss_nats_sd",)
TITLES = {
    "loss_nats": "held-out loss [nats]",
    "perplexity": "perplexity",
    "train_loss_nats": "training loss [nats]",
    "exact-match.exact_match": "exact match",
    "upload_bytes": "up",
    "download_bytes": "down",
    "seconds": "time",
    "aggregation_noise": "noise, last round",
}


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
    """Group runs: a label is the method's name, with the settings that tell equal names apart."""
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
    shared = Counter(run.method for run in runs)
    labels = []
    for run in runs:
        same = [flatten(other.config) for other in runs if other.method == run.method]
        mine = flatten(run.config)
        told = [
            f"{name.rpartition('.')[2]}={mine.get(name)}"
            for name in mine
            if name not in _INDIVIDUAL and any(other.get(name) != mine[name] for other in same)
        ]
        labels.append(f"{run.method} ({', '.join(told)})" if shared[run.method] > 1 and told else run.method)
    return labels


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


def value_by_round(group: RunGroup, key: str) -> Curve:
    """Return a number of the records against rounds, leaving out rounds without it."""
    return curve(
        group,
        {
            i: [(r["round"], float(r["round"]), float(r[key])) for r in run.records if r.get(key) is not None]
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
    before = ((run.finished or {}).get("base_eval") or {}).get("loss_nats")
    start = [] if before is None else [(0, 0.0, float(before))]
    sent = accumulate((r.get("upload_bytes") or 0) + (r.get("download_bytes") or 0) for r in run.records)
    return start + [
        (record["round"], float(total), float(record["eval"]["loss_nats"]))
        for record, total in zip(run.records, sent, strict=True)
        if (record.get("eval") or {}).get("loss_nats") is not None
    ]


def results(run: StoredRun) -> dict[str, float]:
    """Return a run's final figures by key: the last evaluation's numbers, and what the run cost."""
    figures = _figures(_final_evaluation(run))
    cost = total_cost(run.records)
    figures |= {"upload_bytes": cost.upload_bytes, "download_bytes": cost.download_bytes, "seconds": cost.seconds}
    noises = [record["aggregation_noise"] for record in run.records if record.get("aggregation_noise") is not None]
    return figures | ({"aggregation_noise": noises[-1]} if noises else {})


def _final_evaluation(run: StoredRun) -> Mapping[str, Any]:
    evaluations = run.evaluations()
    return (run.finished or {}).get("eval") or (evaluations[-1]["eval"] if evaluations else {})


def _figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses, and each suite's scores by ``suite.metric``; neither counts nor what is told client by client.

    Nothing of an interval, either: the table has its own, over seeds.
    """
    suites = {
        f"{suite}.{name}": found["value"]
        for suite, scores in evaluation.get("suites", {}).items()
        for name, found in scores["metrics"].items()
    }
    numbers = {key: value for key, value in evaluation.items() if not key.startswith(_COUNTS) and key not in _SPREADS}
    return {
        key: float(value)
        for key, value in {**numbers, **suites}.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def by_group(groups: Sequence[RunGroup]) -> dict[str, dict[str, dict[str, float]]]:
    """Return by figure, then by group of held-out rows (category, subject), every run group's final mean over seeds.

    The figures are the loss, and of each suite the first metric; empty where nothing was told group by group.
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
    return ({"loss_nats": dict(losses)} if losses else {}) | suites


def result_table(groups: Sequence[RunGroup], reference: str | None = None) -> Comparison:
    """Return the table of every group's final figures over its seeds."""
    by_group = {group.label: {run.seed: results(run) for run in group.runs} for group in groups}
    keys = {key: None for seeds in by_group.values() for row in seeds.values() for key in row}
    last = ("upload_bytes", "download_bytes", "seconds", "aggregation_noise")
    ordered = [key for key in keys if key not in last] + [key for key in last if key in keys]
    return compare(by_group, [metric_of(key) for key in ordered], reference)


def metric_of(key: str) -> Metric:
    """Return how a figure is headed, written and judged, from its name."""
    name = key.split(".")[-1]
    title = TITLES.get(key, key.replace("_", " ").replace(".", " · "))
    if key.endswith("_bytes"):
        return Metric(key, title, "neither", "B")
    if key == "seconds":
        return Metric(key, title, "neither", "s")
    better: Better = (
        "higher" if name.startswith(_HIGHER) else "lower" if "loss" in name or "perplex" in name else "neither"
    )
    unit: Unit = "%" if name.startswith(_SHARES) else ""
    return Metric(
        key, title, better if key != "aggregation_noise" else "lower", unit, digits=4 if "loss" in name else 3
    )


def client_entries(run: StoredRun) -> list[Mapping[str, Any]]:
    """Return each client's entry of the last round it took part in, by client."""
    latest = {entry["client"]: entry for record in run.records for entry in record.get("clients") or []}
    return [latest[client] for client in sorted(latest)]
