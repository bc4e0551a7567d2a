"""Every figure of a run, declared once: what tables, charts and trackers call it, which way is better, where it stands.

A figure that is not declared here is still shown, under its own name and without a verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedloom.wording import Unit

Better = Literal["lower", "higher", "neither"]
OverRounds = Literal["last", "sum", "max"]


@dataclass(frozen=True)
class Metric:
    """A figure: its key in results, its heading, which way is better, and how it is written.

    ``path`` leads to it in a round's record, where a mapping (seconds by phase) means its sum. ``over_rounds``
    says what a whole run's figure is: the last round's that has one, the sum, or the highest.
    """

    key: str
    title: str
    better: Better = "lower"
    unit: Unit = ""
    digits: int = 3
    path: tuple[str, ...] = ()
    over_rounds: OverRounds = "last"

    def of(self, record: Mapping[str, Any]) -> float | None:
        """Return the figure of one record, None where it has none."""
        found: Any = record
        for name in self.path:
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            found = sum(found.values())
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    def of_run(self, records: Iterable[Mapping[str, Any]]) -> float | None:
        """Return the figure of a run from the records of its rounds, None where no round has one."""
        found = [value for record in records if (value := self.of(record)) is not None]
        if not found:
            return None
        match self.over_rounds:
            case "last":
                return found[-1]
            case "sum":
                return sum(found)
            case "max":
                return max(found)


def _score(suite: str, name: str, title: str, unit: Unit = "") -> Metric:
    path = ("eval", "suites", suite, "metrics", name, "value")
    return Metric(f"{suite}.{name}", title, "higher", unit, 4, path)


# What bytes, seconds, memory and noise have in common: they are paid, not gained, so less is better everywhere. Noise
# is the distance of what was applied from the exact mean; whether it harms the model is for the loss to say.
LOSS = Metric("loss_nats", "held-out loss [nats]", path=("eval", "loss_nats"))
CLIENT_LOSS = Metric("client_loss_nats", "clients' own rows: loss [nats]", path=("eval", "clients", "loss_nats"))
# Neither better nor worse: a budget, which is to be equal.
ROWS_TRAINED = Metric("rows_trained", "rows trained on", "neither", digits=0, path=("rows_trained",), over_rounds="sum")
NOISE = Metric("aggregation_noise", "aggregation noise", path=("aggregation_noise",))
# It says what clients have in common, not how good a method is: drawn, but no column.
AGREEMENT = Metric("agreement", "share of the clients' work left in the mean", "neither", path=("agreement",))
DEVICE_PEAK = Metric(
    "peak_device_memory_bytes",
    "peak device memory",
    unit="B",
    path=("peak_device_memory_bytes",),
    over_rounds="max",
)
# Of the process since its start, so a later run of one comparison never has less: shown, but no column.
PEAK = Metric("peak_memory_bytes", "peak memory", "neither", "B", path=("peak_memory_bytes",), over_rounds="max")
FIGURES = (
    LOSS,
    Metric("perplexity", "perplexity", digits=2, path=("eval", "perplexity")),
    CLIENT_LOSS,
    Metric("client_loss_nats_worst_tenth", "worst tenth", path=("eval", "clients", "loss_nats_worst_tenth")),
    Metric("client_loss_nats_worst", "worst client", path=("eval", "clients", "loss_nats_worst")),
    _score("e2e", "BLEU", "BLEU"),
    _score("e2e", "NIST", "NIST"),
    _score("e2e", "METEOR", "METEOR"),
    _score("e2e", "ROUGE_L", "ROUGE_L"),
    _score("e2e", "CIDEr", "CIDEr"),
    _score("mmlu", "accuracy", "MMLU accuracy", "%"),
    _score("mmlu", "macro_accuracy", "MMLU macro accuracy", "%"),
    _score("multiple-choice", "accuracy", "multiple-choice accuracy", "%"),
    _score("multiple-choice", "macro_accuracy", "multiple-choice macro accuracy", "%"),
    _score("exact-match", "exact_match", "exact match", "%"),
    _score("last-number", "exact_match", "last number", "%"),
    NOISE,
    Metric("upload_bytes", "bytes up", unit="B", path=("upload_bytes",), over_rounds="sum"),
    Metric("download_bytes", "bytes down", unit="B", path=("download_bytes",), over_rounds="sum"),
    Metric("epsilon", "ε", path=("privacy", "epsilon")),
    ROWS_TRAINED,
    Metric("num_rounds", "rounds", "neither", digits=0, path=("round",)),
    DEVICE_PEAK,
    Metric("seconds", "time", unit="s", path=("seconds",), over_rounds="sum"),
)
"""The figures of a run, in the order of a table's columns."""

CLIENT_FIGURES = (
    Metric("loss_nats", "training loss [nats]", path=("loss_nats",)),
    Metric("num_rows", "rows", "neither", digits=0, path=("num_rows",)),
    Metric("epsilon", "ε spent", path=("epsilon",)),
    Metric("norm", "norm of the update", "neither", path=("norm",)),
    Metric("seconds", "seconds", unit="s", path=("seconds",)),
    Metric("upload_bytes", "bytes sent up", unit="B", path=("upload_bytes",)),
    Metric("download_bytes", "bytes received", unit="B", path=("download_bytes",)),
)
"""The figures of a client's entry in a round's record."""


def was_left_out(client: Mapping[str, Any]) -> bool:
    """Return whether a client's entry in a round's record reports an update that was dropped."""
    return bool(client.get("reason"))


_BY_KEY = {metric.key: metric for metric in FIGURES}
_COSTS = {metric.key for metric in FIGURES if metric.over_rounds != "last"}


def metric_of(key: str) -> Metric:
    """Return the declaration of a run's figure; one that is not declared is shown by its key and not judged."""
    return _BY_KEY.get(key) or Metric(key, key.replace("_", " ").replace(".", " · "), "neither")


def figures_of(evaluation: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return a run's figures by key: those of its final evaluation, and those of its rounds.

    Every suite's scores are among them, declared or not. A cost of zero is skipped: where nothing crosses, a run is
    not the best of those that send.
    """
    evaluated = [{"eval": evaluation}]
    found = {m.key: m.of_run(evaluated if m.path[0] == "eval" else records) for m in FIGURES}
    figures = {key: value for key, value in found.items() if value is not None and not (key in _COSTS and value == 0)}
    return figures | {key: value for key, value in _scores(evaluation).items() if key not in figures}


def metrics_among(rows: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics that at least one row has, declared ones first and in their order."""
    keys = dict.fromkeys(key for row in rows for key in row)
    declared = [metric for metric in FIGURES if metric.key in keys]
    return declared + [metric_of(key) for key in keys if key not in _BY_KEY]


def _scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{suite}.{name}": float(found["value"])
        for suite, scores in evaluation.get("suites", {}).items()
        for name, found in scores["metrics"].items()
        if found["value"] is not None
    }
