"""What a comparison chose for its methods: every point that was tried, its validation loss, and where that stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from fedloom.errors import RunError
from fedloom.file_formats import TUNING
from fedloom.reporting.metrics import LOSS
from fedloom.run_folder import durable
from fedloom.run_folder.manifest import sealed, unsealed
from fedloom.wording import counted, one_line, written

FILE = "tuning.json"
HEAD = ("method", "settings", "validation loss [nats]", "")


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TunedPoint(_Record):
    """Values that were tried, the run's folder, and its validation loss, or the reason why there is none."""

    values: dict[str, Any]
    folder: str
    loss_nats: float | None
    reason: str | None = None

    @property
    def title(self) -> str:
        """The values, as a user writes them."""
        return ", ".join(f"{name} = {durable.encode_json(value)}" for name, value in self.values.items())


class TunedMethod(_Record):
    """A method's points, in the order of its grid, and which of them was chosen."""

    method: str
    points: list[TunedPoint]
    chosen: int

    @property
    def edges(self) -> list[str]:
        """Where the chosen numbers are the lowest or highest that were tried."""
        found = []
        for name, value in self.points[self.chosen].values.items():
            tried = {point.values[name] for point in self.points if _is_number(point.values.get(name))}
            if _is_number(value) and len(tried) > 1 and value in (min(tried), max(tried)):
                found.append(f"the {'lowest' if value == min(tried) else 'highest'} {name} of the grid")
        return found


class Tuning(_Record):
    """What was chosen for the methods of a comparison, on ``num_rows`` validation rows of one seed.

    ``skipped`` gives by method and setting the reason why a grid does not count for it.
    """

    format_version: int
    seed: int
    fraction: float
    num_rows: int
    methods: list[TunedMethod]
    skipped: dict[str, dict[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with what is at the edge of a grid."""
        found = self.model_dump(mode="json")
        for method, plain in zip(self.methods, found["methods"], strict=True):
            plain["edges"] = method.edges
        return found

    def rows(self) -> Iterator[tuple[list[str], bool]]:
        """Yield a line per point that was tried, as in :data:`HEAD`, and whether it was chosen."""
        for method in self.methods:
            for index, point in enumerate(method.points):
                is_chosen = index == method.chosen
                loss = point.reason if point.loss_nats is None else written(point.loss_nats, LOSS.unit, 4)
                note = ", ".join(["chosen", *method.edges]) if is_chosen else ""
                yield [method.method, point.title, loss or "none", note], is_chosen

    def caption(self) -> str:
        """Say on what the choice was made, and what was not tuned."""
        told = [
            f"Chosen per method by the loss on {counted(self.num_rows, 'validation row')} of seed {self.seed}: "
            f"{100 * self.fraction:g} % of the training rows that no run is scored on, kept apart from training. The "
            "compared runs train on all training rows."
        ]
        if any(method.edges for method in self.methods):
            told.append("Where a value at the edge of its grid was chosen, a wider grid may give a lower loss.")
        skipped = [f"{name} of {method}: {why}" for method, ones in self.skipped.items() for name, why in ones.items()]
        told += [f"Not chosen: {'; '.join(skipped)}."] if skipped else []
        return " ".join(told)

    def to_rich(self) -> Table:
        """Return the points for a terminal; the chosen ones are bold."""
        table = Table(caption=Text(one_line(self.caption()), style="table.caption"), caption_justify="left")
        for title in HEAD:
            table.add_column(Text(title))
        for cells, is_chosen in self.rows():
            table.add_row(*(Text(one_line(cell), style="bold" if is_chosen else "") for cell in cells))
        return table

    def write(self, folder: Path) -> None:
        """Write it into a comparison's folder, with a hash."""
        durable.write_json(folder / FILE, sealed(self.model_dump(mode="json")))


def read_tuning(folder: Path) -> Tuning | None:
    """Return what a comparison's folder says was chosen; None where nothing was.

    Raises:
        RunError: the file is damaged, or of another format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    document = durable.read_json(path)
    TUNING.check(path, document.get("format_version") if isinstance(document, dict) else None, RunError)
    return Tuning.model_validate(unsealed(path, document, Tuning, "run the comparison again, which writes it anew"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
