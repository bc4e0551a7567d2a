"""Tokens of many rows in three flat arrays: what is read, what is learned, where each row begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Rows of tokens without padding.

    ``input_ids`` (T,) int32 and ``supervised`` (T,) bool are flat; row i is the range ``starts[i]:starts[i+1]`` of
    both, with ``starts`` (N+1,) int64. A supervised token is a target: the model predicts it from those before it in
    its row, so a row's first token never is one. ``units`` (N,) int64 are equal for rows that come from one row of a
    file, and None where each is a row of its own. The arrays are read-only.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    starts: IntArray
    units: IntArray | None = None

    def __post_init__(self) -> None:
        if len(self.starts) == 0 or self.starts[0] != 0 or self.starts[-1] != len(self.input_ids):
            raise ValueError("starts must run from 0 to the number of tokens")
        if len(self.supervised) != len(self.input_ids) or (np.diff(self.starts) < 0).any():
            raise ValueError("input_ids and supervised must have one length, and starts must not fall")
        if self.units is not None and len(self.units) != len(self):
            raise ValueError("units must have one entry per row")
        for array in (self.input_ids, self.supervised, self.starts):
            array.setflags(write=False)

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> TokenSet:
        """Join rows given as pairs (ids, supervised)."""
        pairs = [(np.asarray(ids, np.int32), np.asarray(learned, np.bool_)) for ids, learned in rows]
        starts = np.zeros(len(pairs) + 1, np.int64)
        np.cumsum([len(ids) for ids, _ in pairs], out=starts[1:])
        if not pairs:
            return cls(np.zeros(0, np.int32), np.zeros(0, np.bool_), starts)
        return cls(np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]), starts)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenSet]) -> TokenSet:
        """Join the rows of several sets, in order; each is a row of its own."""
        if not parts:
            return cls.from_rows([])
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.supervised for part in parts]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return the ids and the supervised mask of one row, as views."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        span = slice(self.starts[index], self.starts[index + 1])
        return self.input_ids[span], self.supervised[span]

    def select(self, indices: npt.ArrayLike) -> TokenSet:
        """Return the rows at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"rows {chosen.min()} to {chosen.max()} of {len(self)}")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[chosen])])
        shift = self.starts[:-1][chosen] - starts[:-1]
        tokens = np.arange(starts[-1]) + np.repeat(shift, np.diff(starts))
        units = None if self.units is None else self.units[chosen]
        return TokenSet(self.input_ids[tokens], self.supervised[tokens], starts, units)

    def by_unit(self) -> list[IntArray]:
        """Return the positions of the rows of each unit, in the order of the units' first rows."""
        if self.units is None:
            return list(np.arange(len(self))[:, None])
        _, first, unit_of_row = np.unique(self.units, return_index=True, return_inverse=True)
        parts = np.split(np.argsort(unit_of_row, kind="stable"), np.cumsum(np.bincount(unit_of_row))[:-1])
        return [parts[unit] for unit in np.argsort(first)] if len(self) else []

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, (N,)."""
        return np.diff(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Supervised tokens of all rows."""
        return int(self.supervised.sum())

    def sha256(self) -> str:
        """Return the hash of the content: equal exactly when ids, mask and row limits are."""
        digest = hashlib.sha256(b"fedloom tokens 1")
        digest.update(np.int64(len(self)).astype("<i8").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        digest.update(self.input_ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.supervised).tobytes())
        return digest.hexdigest()
