"""How long a recipe's rows are: by a sample of them, or what the settings allow where none is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom import embedded
from fedloom.config import Settings
from fedloom.data.encoding import encode
from fedloom.data.records import read_records
from fedloom.data.sources import Rows, load_rows
from fedloom.data.templates import AUTO
from fedloom.data.tokenizer import BYTES, load_tokenizer
from fedloom.errors import FedloomError
from fedloom.models.causal import context_of
from fedloom.seeding import stream
from fedloom.split.cost_model import Work

SAMPLED_ROWS = 300
ASSUMED_SHARE = 0.5
"""Share of a row that is learnt, of rows that nobody has read."""


@dataclass(frozen=True, eq=False)
class RowSample:
    """Tokens of some rows and how many of them are learnt; ``num_rows`` is of all rows, None where nobody knows.

    ``told`` says where they come from.
    """

    lengths_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    num_rows: int | None
    told: str

    def work(self, batch_size: int) -> Work:
        """Return a step of so many rows."""
        mean = float(self.lengths_N.mean())
        return Work(batch_size * mean, batch_size * float(self.targets_N.mean()), mean)


def rows_here(settings: Settings) -> Rows | None:
    """Return the rows that a recipe reads; None where they are not on this machine, or cannot be read.

    What is wrong with rows is said by those who read all of them.
    """
    if settings.data.path != embedded.NAME and not Path(settings.data.path).expanduser().exists():
        return None
    try:
        return _read(settings)
    except FedloomError:
        return None


def _read(settings: Settings) -> Rows:
    data = settings.data
    return load_rows(data.path, data.split, subset=data.subset, revision=data.revision)


def sampled_rows(settings: Settings, rows: Rows | None = None) -> RowSample:
    """Return a sample of the recipe's training rows, which are read where they are not given.

    Raises:
        DataError: if the rows cannot be read.
    """
    data, rows = settings.data, _read(settings) if rows is None else rows
    chosen = np.sort(stream(settings.run.seed, "describe").permutation(len(rows))[:SAMPLED_ROWS])
    tokens = encode(
        read_records(rows.select(chosen), data.shape, data.columns),
        load_tokenizer(
            settings.model.tokenizer or embedded.base_path(settings.model.base),
            trust_remote_code=settings.model.trust_remote_code,
        ),
        template=data.template or AUTO,
        date=data.day,
        max_length=data.max_length,
        loss_on=data.loss_on,
        overlong="error" if data.max_length is None else data.overlong,
        unanswered=data.unanswered,
    ).tokens
    learnt = np.array([int(tokens.row(i)[1][1:].sum()) for i in range(len(tokens))])
    told = f"{len(tokens):,} of {len(rows):,} rows read, of {tokens.lengths.mean():.0f} tokens on average"
    return RowSample(tokens.lengths, learnt, len(rows), told)


def known_rows(settings: Settings, config: Any, rows: Rows | None) -> RowSample:
    """Return a sample of :func:`rows_here` where the tokenizer is here too, else rows as long as the settings allow."""
    tokenizer = settings.model.tokenizer or settings.model.base
    is_here = tokenizer in (embedded.NAME, BYTES) or Path(tokenizer).expanduser().is_dir()
    if is_here and rows is not None:
        try:
            return sampled_rows(settings, rows)
        except FedloomError:
            pass
    budget = settings.training.token_budget
    length = settings.data.max_length or min(context_of(config) or budget, budget)
    targets = length - 1 if settings.data.loss_on == "all" else max(1, round(ASSUMED_SHARE * length))
    half = "" if settings.data.loss_on == "all" else ", half of them learnt"
    told = f"rows not read, every one taken as {length:,} tokens{half}"
    return RowSample(np.array([length]), np.array([targets]), None, told)
