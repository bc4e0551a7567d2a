"""Number the distinct values of a column."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt


def group(values: Sequence[Hashable]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the distinct values as text, in first-seen order, and each row's position among them."""
    number_of: dict[str, int] = {}
    group_of_row = np.fromiter(
        (number_of.setdefault(str(value), len(number_of)) for value in values), np.int64, count=len(values)
    )
    return list(number_of), group_of_row


def members(group_of_row: npt.NDArray[np.int64], num_groups: int) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each group, in rising order."""
    order = np.argsort(group_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(group_of_row, minlength=num_groups))[:-1])
