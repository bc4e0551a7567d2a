"""What a run asks of an engine besides training: what its clients keep, and the loss of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedloom.clients.memory import Memory
from fedloom.data.tokens import TokenSet
from fedloom.federation.rounds import Engine
from fedloom.lora.pair import Adapter
from fedloom.training.row_losses import RowLosses


class RunningEngine(Engine, Protocol):
    """An engine that has been started."""

    @property
    def clients_at_once(self) -> int:
        """How many clients train together in one place."""
        ...

    def held(self) -> Mapping[int, Memory]:
        """Return what clients keep, for a checkpoint; nothing of those that keep it elsewhere."""
        ...

    def row_losses(self, adapter: Adapter, rows: TokenSet, token_budget: int) -> RowLosses:
        """Return the loss of every row under the base with an adapter: the same numbers wherever they are computed."""
        ...
