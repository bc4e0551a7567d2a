"""Which schedules train on as many rows as a recipe: its rounds, local steps and clients a round, and what each sends.

At equal rows the number of steps of the global model is what counts most (docs/choosing.md): few clients a round, and
short rounds; of a step that the server takes, one client. Bytes and round trips are what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.config import Settings, with_method
from fedloom.config.loading import check, replaced
from fedloom.errors import SettingsError
from fedloom.lora.layer import LoRAModel
from fedloom.methods import table
from fedloom.preview.message_sizes import MessageSizes, message_sizes
from fedloom.wording import written_bytes

DRAWN = 0.3
"""Share of the clients that a proposed round draws, up to ``MOST_DRAWN``."""
MOST_DRAWN = 10
STEPS = 5
"""Local steps of a short round."""
MOST_ROWS = 4
"""Rows of a proposed step; a short round's steps are of a quarter of them."""


@dataclass(frozen=True)
class Schedule:
    """A way to spend the rows: what it is, the settings that choose it, and its costs.

    ``settings`` are by full name, without those that the recipe has. Bytes are those of the whole run, over all
    clients. Every round is one trip from the server to its clients and back.
    """

    title: str
    settings: Mapping[str, Any]
    num_rounds: int
    clients_per_round: int
    local_steps: int
    batch_size: int
    upload_bytes: float
    download_bytes: float

    @property
    def num_rows(self) -> int:
        """Rows trained on in the whole run."""
        return self.num_rounds * self.clients_per_round * self.local_steps * self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Return the schedule as plain values."""
        return {**self.__dict__, "settings": dict(self.settings), "num_rows": self.num_rows}


def proposed_schedules(
    settings: Settings, lora: LoRAModel, sizes: MessageSizes, num_rows: int | None = None
) -> tuple[Schedule, ...]:
    """Return the recipe's schedule and others of as many rows, or of ``num_rows`` where it trains for epochs.

    ``sizes`` are those of the recipe's own messages.
    There are none for what is not federated, and none where nobody says how many rows there are.
    """
    training, federation = settings.training, settings.federation
    if not settings.traits.aggregates:
        return ()
    found = []
    if training.local_steps is not None:
        found.append(_schedule("as set", settings, {}, sizes))
        num_rows = num_rows or found[0].num_rows
    if num_rows is None:
        return ()
    drawn = min(MOST_DRAWN, math.ceil(DRAWN * federation.num_clients))
    rows = min(MOST_ROWS, training.batch_size)
    wanted = [("few clients a round", settings.method.name, drawn, STEPS, rows)]
    for method in _made_for_many_rounds():
        wanted += [
            ("short rounds", method, drawn, STEPS, max(1, rows // 4)),
            ("synchronised steps", method, drawn, 1, rows),
            ("one client a step", method, 1, 1, rows),
        ]
    for title, method, clients, steps, batch_size in wanted:
        values = {
            "federation.num_rounds": max(1, round(num_rows / (clients * steps * batch_size))),
            "federation.clients_per_round": clients,
            "training.local_steps": steps,
            "training.batch_size": batch_size,
        }
        if (other := _with(settings, method, values)) is not None:
            asked = {"method.name": method, **values}
            differing = {name: value for name, value in asked.items() if value != settings.value(name)}
            if differing:
                found.append(_schedule(title, other, differing, message_sizes(other, lora, other.client_ranks)))
    return tuple(found)


def _made_for_many_rounds() -> list[str]:
    """Return the methods that have a default of their own for a step a round."""
    return [name for name in table.names() if "server.step" in table.traits_of(name).defaults]


def _with(settings: Settings, method: str, values: Mapping[str, Any]) -> Settings | None:
    """Return the recipe with another schedule, None where something else in it does not go with that."""
    try:
        changed = with_method(replaced(settings, values, {}), method, keep=values)
        check(changed)
    except SettingsError:
        return None
    return changed


def _schedule(title: str, settings: Settings, values: Mapping[str, Any], sizes: MessageSizes) -> Schedule:
    num_rounds, cohort, training = settings.federation.num_rounds, settings.cohort_size, settings.training
    up, down = sizes.of_run(cohort, num_rounds)
    assert training.local_steps is not None
    return Schedule(title, values, num_rounds, cohort, training.local_steps, training.batch_size, up, down)


def schedule_lines(schedules: Sequence[Schedule]) -> list[str]:
    """Return schedules for people, each with the options that choose it."""
    titles = [one.title for one in schedules]
    width = max(map(len, titles))
    lines = [
        "schedules of as many rows, each with its bytes over the whole run (see docs/choosing.md):",
        f"{'':{width}}  {'rounds':>7}  {'clients':>7}  {'steps':>5}  {'rows a step':>11}  {'rows':>9}"
        f"  {'up':>9}  {'down':>9}",
    ]
    for one in schedules:
        up, down = written_bytes(one.upload_bytes), written_bytes(one.download_bytes)
        lines.append(
            f"{one.title:{width}}  {one.num_rounds:>7,}  {one.clients_per_round:>7,}  {one.local_steps:>5,}"
            f"  {one.batch_size:>11,}  {one.num_rows:>9,}  {up:>9}  {down:>9}"
        )
        if one.settings:
            lines.append("    " + " ".join(f"--set {name}={value}" for name, value in one.settings.items()))
    return lines
