"""Where a run's numbers also go: TensorBoard always; Weights & Biases and MLflow where they are installed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fedloom.errors import MissingExtraError
from fedloom.reporting.metrics import CLIENT_FIGURES, FIGURES
from fedloom.run_folder.manifest import flatten

MAX_CLIENTS = 100
"""Clients, by number, that have series of their own: more are more than a tracker's pages show."""
_RUN_TAG, _GROUP_TAG = "fedloom.run", "fedloom.group"
_UNUSABLE = re.compile(r"[^A-Za-z0-9_\-. :/]")
"""What MLflow takes in no name of a metric."""


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
        for name, value in series(record).items():
            if name != "round":
                self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


@dataclass(frozen=True)
class TrackedRun:
    """How a run is known to trackers.

    Attributes:
        id: the run's own, from its manifest: a resumed run continues under it, another run never does.
        name: that of its folder.
        project, group, tags: as the settings say; of what they leave out the environment decides, else a default.
        folder: where it is; runs in one folder, as those of a comparison, are one group by default.
        config: its settings.
    """

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    project: str | None = None
    group: str | None = None
    tags: tuple[str, ...] | None = None

    def project_or(self, variable: str) -> str:
        """Return the project: the settings', that of an environment variable, or ``fedloom``."""
        return self.project or os.environ.get(variable) or "fedloom"

    def group_or(self, variable: str | None = None) -> str:
        """Return the group: the settings', that of an environment variable, or that of the folder that holds the run.

        Folders of one name in two places are two groups; only a hash tells the place.
        """
        place = self.folder.resolve().parent
        here = f"{place.name or 'root'}-{sha256(str(place).encode()).hexdigest()[:8]}"
        return self.group or (variable and os.environ.get(variable)) or here


def client_series(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, number) for every figure of the first clients of a record: ``clients/0/loss_nats``."""
    for entry in record.get("clients") or ():
        client = entry.get("client")
        if not isinstance(client, int) or client >= MAX_CLIENTS:
            continue
        name = str(entry.get("name", client)).replace("/", "_")
        label = name if name == str(client) else f"{client}-{name}"
        figures = {".".join(figure.path): entry.get(figure.path[0]) for figure in CLIENT_FIGURES}
        yield from scalars(figures, f"clients/{label}/")


def series(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of a record by name, those of its clients too."""
    return {**dict(scalars(record)), **dict(client_series(record))}


class WandbTracker:
    """Log to Weights & Biases.

    Of every declared figure its summary holds the best round beside the last.
    """

    def __init__(self, tracked: TrackedRun) -> None:
        wandb = _module("wandb")
        self._run = wandb.init(
            project=tracked.project_or("WANDB_PROJECT"),
            group=tracked.group_or("WANDB_RUN_GROUP"),
            tags=tracked.tags,  # None: wandb itself reads WANDB_TAGS
            name=tracked.name,
            id=tracked.id,
            resume="allow",
            config=dict(tracked.config),
        )
        for metric in FIGURES:
            if metric.over_rounds == "last" and metric.better != "neither":
                best = "min" if metric.better == "lower" else "max"
                self._run.define_metric("/".join(metric.path), summary=f"{best},last")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one step per round."""
        self._run.log(series(record), step=record["round"])

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


class MlflowTracker:
    """Log to MLflow, to the server or folder its own environment names."""

    def __init__(self, tracked: TrackedRun) -> None:
        mlflow = _module("mlflow")
        experiment = mlflow.set_experiment(tracked.project_or("MLFLOW_EXPERIMENT_NAME")).experiment_id
        self._client = mlflow.MlflowClient()
        earlier = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{tracked.id}'")
        self._run_id = (earlier[0] if earlier else self._started(tracked, experiment)).info.run_id

    def _started(self, tracked: TrackedRun, experiment: str) -> Any:
        tags = dict.fromkeys(tracked.tags or (), "true") | {_RUN_TAG: tracked.id, _GROUP_TAG: tracked.group_or()}
        run = self._client.create_run(experiment, run_name=tracked.name, tags=tags)
        for key, value in flatten(tracked.config).items():
            self._client.log_param(run.info.run_id, key, value)
        return run

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one metric per number."""
        for key, value in series(record).items():
            self._client.log_metric(self._run_id, _UNUSABLE.sub("_", key), value, step=record["round"])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


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
