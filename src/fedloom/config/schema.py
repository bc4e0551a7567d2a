"""The settings of an experiment: every table once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from fedloom.config.algorithm import Federation, Method, Server, Split, Training
from fedloom.config.conduct import Devices, Engine, Evaluation, Run, Wire
from fedloom.config.input_tables import Data, Model, Partition
from fedloom.config.privacy_table import Privacy
from fedloom.config.setting import Table
from fedloom.methods.table import traits_of
from fedloom.methods.traits import GRADIENT, Traits
from fedloom.names import name_order

Number = TypeVar("Number", int, float)
SKETCHING_CLIENTS = 32
"""Clients that sketch the first gradient, where there are as many and no more are drawn in a round."""
PER_CLIENT = (
    "method.ranks",
    "method.alpha",
    "split.cut_layer",
    "split.client_rank",
    "devices.client_flops",
    "devices.client_memory_gib",
    "devices.uplink_mbit_per_second",
    "devices.downlink_mbit_per_second",
    "devices.latency_ms",
)
"""Settings that may differ by client: one value for all, a list by position, or a table by name."""


class Settings(Table):
    """A resolved experiment. Frozen; ``as_dict`` gives plain values that ``load`` reads back as the same settings."""

    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    partition: Partition = Field(default_factory=Partition)
    method: Method = Field(default_factory=Method)
    server: Server = Field(default_factory=Server)
    federation: Federation = Field(default_factory=Federation)
    training: Training = Field(default_factory=Training)
    privacy: Privacy = Field(default_factory=Privacy)
    split: Split = Field(default_factory=Split)
    devices: Devices = Field(default_factory=Devices)
    wire: Wire = Field(default_factory=Wire)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    engine: Engine = Field(default_factory=Engine)
    run: Run = Field(default_factory=Run)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return every setting as plain JSON values, table by table."""
        return self.model_dump(mode="json")

    def value(self, name: str) -> Any:
        """Return the setting called ``name``, e.g. ``"training.batch_size"``."""
        table, _, key = name.partition(".")
        return getattr(getattr(self, table), key)

    def on(self, date: str) -> Settings:
        """Return the settings of a run that began on ``date``: chat templates are told that day, or ``data.date``."""
        return self.model_copy(update={"data": self.data.model_copy(update={"date": self.data.date or date})})

    @property
    def traits(self) -> Traits:
        """What there is to know of ``method.name``."""
        return traits_of(self.method.name)

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """One adapter rank per client."""
        return self.per_client(self.method.ranks)

    @property
    def client_scales(self) -> tuple[float, ...]:
        """One factor on B·A per client: alpha/r, or alpha/√r for rsLoRA; alpha is twice the rank by default."""
        ranks = self.client_ranks
        alphas = (
            tuple(2.0 * rank for rank in ranks) if self.method.alpha is None else self.per_client(self.method.alpha)
        )
        divisors = ranks if self.method.scaling == "alpha/r" else tuple(math.sqrt(rank) for rank in ranks)
        return tuple(alpha / divisor for alpha, divisor in zip(alphas, divisors, strict=True))

    @property
    def cohort_size(self) -> int:
        """Clients drawn per round: all, a number, or max(⌊fraction · clients⌋, 1) as Shepherd does."""
        drawn = self.federation.clients_per_round
        match drawn:
            case None:
                return self.federation.num_clients
            case int():
                return drawn
            case float():
                return max(math.floor(drawn * self.federation.num_clients + 1e-9), 1)

    @property
    def ranks_of_a_round(self) -> int:
        """The most that the ranks of a round's clients add up to."""
        every = self.federation.participation is not None
        return sum(sorted(self.client_ranks, reverse=True)[: None if every else self.cohort_size])

    @property
    def sampling_rate(self) -> float:
        """The chance of each client to be drawn where each is drawn by itself."""
        drawn, clients = self.federation.clients_per_round, self.federation.num_clients
        return drawn if isinstance(drawn, float) else (drawn or clients) / clients

    @property
    def start_rounds(self) -> int:
        """Rounds before the first of ``federation.num_rounds``: one where the first A comes from the gradient."""
        return int(self.method.initialisation == GRADIENT)

    @property
    def sketch_cohort_size(self) -> int:
        """Clients whose gradients the first A comes from: all, of a large population some."""
        return min(self.federation.num_clients, max(self.cohort_size, SKETCHING_CLIENTS))

    def per_client(self, value: Number | tuple[Number, ...] | dict[str, Number]) -> tuple[Number, ...]:
        """Spread one value over all clients; a list is returned as it is, a table in order of its names.

        That is the order of the clients, unless a saved partition has another: :func:`resolve_names` asks it.
        """
        if isinstance(value, dict):
            return tuple(value[name] for name in sorted(value, key=name_order))
        return value if isinstance(value, tuple) else (value,) * self.federation.num_clients

    @model_validator(mode="before")
    @classmethod
    def _count_names(cls, given: Any) -> Any:
        """Where clients are named and not counted, there are as many as names."""
        if not isinstance(given, dict) or not isinstance(federation := given.get("federation", {}), dict):
            return given
        tables = [(given.get(table), key) for table, _, key in (name.partition(".") for name in PER_CLIENT)]
        named = [
            value for table, key in tables if isinstance(table, dict) and isinstance(value := table.get(key), dict)
        ]
        if not any(named) or "num_clients" in federation:
            return given
        return {**given, "federation": {**federation, "num_clients": max(map(len, named))}}


def tables() -> dict[str, type[Table]]:
    """Return the tables by name, in the order of the documentation."""
    return {name: field.annotation for name, field in Settings.model_fields.items()}  # type: ignore[misc]


def every_setting() -> Iterator[tuple[str, FieldInfo]]:
    """Yield each setting's full name and declaration, e.g. ``("wire.dtype", ...)``."""
    for table, kind in tables().items():
        for key, field in kind.model_fields.items():
            yield f"{table}.{key}", field


def counted_by_data(settings: Settings) -> bool:
    """Tell whether the data say how many clients there are, so that another number is no way out."""
    return settings.partition.scheme == "natural" or settings.partition.path is not None
