"""The rows of each client that are held out to score it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedloom.data.tokens import TokenSet


@dataclass(frozen=True, eq=False)
class OwnRows:
    """Clients' own held-out rows in one set; ``members`` are the positions of each client's, ``names`` its name."""

    tokens: TokenSet | None = None
    members: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: TokenSet, owner_of_row: npt.NDArray[np.int64], names: Sequence[str]) -> OwnRows:
        """Return the rows by their owners; clients without any are absent."""
        members = {int(client): np.flatnonzero(owner_of_row == client) for client in np.unique(owner_of_row)}
        return cls(tokens, members, {client: names[client] for client in members})

    @property
    def sha256(self) -> str | None:
        """Hash of the tokens; None where nothing is held out."""
        return None if self.tokens is None else self.tokens.sha256()
