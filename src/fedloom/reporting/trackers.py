"""Where a run's numbers also go: TensorBoard always; Weights & Biases and MLflow where they are installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fedloom.errors import MissingExtraError
from fedloom.reporting.metrics import FIGURES
from fedloom.run_folder.manifest import flatten


class Tracker(Protocol):
    """Receives one record per round."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take the record of one round; it holds ``round``."""

    def close(self) -> None:
        """Write out what is held back."""


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, number) for every number of a record, nested names joined by slashes; lists are skipped."""
    for key, value in record.items():
        match value:
            case bool() | None:
                continue
            case int() | float():
                yield f"{prefix}{key}", float(value)
            case Mapping():
                yield from scalars(value, f"{prefix}{key}/")
            case _:
                continue


class TensorBoardTracker:
    """Write events into ``folder``; a resumed run hides what an earlier process logged after ``num_rounds_done``."""

    def __init__(self, folder: Path, num_rounds_done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=num_rounds_done + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one scalar per number."""
        for name, value in scalars(record):
            if name != "round":
                self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """Log to Weights & Biases; the run's folder name identifies it, so that a resumed run continues there.

    Of every declared figure its summary holds the best round beside the last.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        wandb = _module("wandb")
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=dict(config))
        for metric in FIGURES:
            if metric.over_rounds == "last" and metric.better != "neither":
                best = "min" if metric.better == "lower" else "max"
                self._run.define_metric("/".join(metric.path), summary=f"{best},last")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one step per round."""
        self._run.log(dict(scalars(record)), step=record["round"])

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


_QUOTES = "'\"`\\"


class MlflowTracker:
    """Log to MLflow, to the server or folder its own environment names; a resumed run continues under its name."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        mlflow = _module("mlflow")
        experiment = mlflow.set_experiment(project).experiment_id
        self._client = mlflow.MlflowClient()
        named = self._client.search_runs([experiment], run_name_filter(name))
        earlier = [run for run in named if run.info.run_name == name]
        run = earlier[0] if earlier else self._client.create_run(experiment, run_name=name)
        self._run_id = run.info.run_id
        if not earlier:
            for key, value in flatten(config).items():
                self._client.log_param(self._run_id, key, value)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one metric per number."""
        for key, value in scalars(record):
            self._client.log_metric(self._run_id, key, value, step=record["round"])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


def run_name_filter(name: str) -> str:
    """Return MLflow's filter for runs of this name; its language has no escape, so a quote is matched by any sign."""
    wild = name.translate(dict.fromkeys(map(ord, _QUOTES), "_"))
    return f"attributes.run_name {'=' if wild == name else 'LIKE'} '{wild}'"


class AllTrackers:
    """Pass every record on to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log to each."""
        for tracker in self._trackers:
            tracker.log(record)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


TRACKERS: dict[str, type[WandbTracker] | type[MlflowTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
"""By the name in a recipe, which is that of the module and of the extra too."""
_PURPOSES = {"wandb": "logging to Weights & Biases", "mlflow": "logging to MLflow"}


def check_trackers(names: Sequence[str]) -> None:
    """Check that what these trackers need is installed.

    Raises:
        MissingExtraError: it is not.
    """
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(name, _PURPOSES[name]) from error
