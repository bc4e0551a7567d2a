"""Begin with an adapter at hand instead of a fresh one: its factors are what clients first train from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedloom.errors import AdapterError
from fedloom.lora.algebra import truncate
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, rank_in
from fedloom.methods.around import Around
from fedloom.methods.state import ServerState


@dataclass(frozen=True)
class ContinuedFrom(Around):
    """A method whose first start is an adapter. No client can draw that by itself, so all of every start crosses.

    Where clients share no start, as in the controls, each begins with a copy.

    Raises:
        AdapterError: the adapter has other modules than the run, or other ranks than the largest of the clients.
    """

    adapter: Adapter

    def __post_init__(self) -> None:
        cohort = self.inner.cohort
        if lacking := sorted(cohort.shapes.keys() - self.adapter.keys()):
            raise AdapterError(
                f"model.train_adapter: expected an adapter of all model.target_modules, it lacks {lacking[0]}; set "
                "model.target_modules to the adapter's own, or drop model.train_adapter"
            )
        for name, pair in self.adapter.items():
            wanted = rank_in(cohort.shapes[name], cohort.max_rank)
            if pair.rank != wanted:
                raise AdapterError(
                    f"model.train_adapter: expected rank {wanted}, the largest of method.ranks, got {pair.rank} at "
                    f"{name}; set method.ranks to the adapter's, or write it at one rank: fedloom export ADAPTER "
                    f"--rank {cohort.max_rank} --to DIR"
                )

    @property
    def origin(self) -> None:
        """Return nothing: the start is no draw."""
        return

    @property
    def drawn(self) -> None:
        """Return nothing: the start is no draw."""
        return

    def initial(self) -> ServerState:
        """Return the method's state before its first round, with the adapter where it shares a start."""
        state = self.inner.initial()
        return state if state.start is None else replace(state, start=self.adapter)

    def start_for(self, state: ServerState, client: int) -> Adapter | Draw:
        """Return what a client trains from."""
        if state.start is None:
            return truncate(self.adapter, self.cohort.rank_of(client))
        return self.inner.start_for(state, client)
