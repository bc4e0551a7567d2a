"""The seam through which the split loop reaches its clients, wherever their halves run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.split.cut_messages import SplitMessage

Memory = dict[str, Tensor]
"""What a client carries over an aggregation: its optimiser's state and its residuals."""


class SplitClients(Protocol):
    """Where the clients' halves run. Requests return at once; what answers them may wait."""

    def begin(
        self, round: int, broadcasts: Mapping[int, Sequence[Broadcast]], memory: Mapping[int, Memory]
    ) -> Iterable[Failure]:
        """Hand each client of the cohort one broadcast per segment, and what it carried over; return who is away."""
        ...

    def request(self, step: int, micro_batch: int, rows: Mapping[int, Sequence[int]]) -> None:
        """Ask for the activations of these rows; a client that must not answer is not named."""
        ...

    def activations(self, step: int, micro_batch: int) -> Iterable[SplitMessage | Failure]:
        """Return what was asked for."""
        ...

    def tails(self, hidden: Sequence[SplitMessage]) -> Iterable[SplitMessage | Failure]:
        """Run the clients' last blocks, head and loss (U-shape); return the gradients at their input."""
        ...

    def gradients(self, messages: Sequence[SplitMessage]) -> None:
        """Send the gradients of a micro-batch's activations."""
        ...

    def finish(self, step: int, clients: Sequence[int]) -> Iterable[Failure]:
        """Let each of these clients take its one optimiser step; return those that cannot."""
        ...

    def end(self, clients: Sequence[int]) -> Iterable[tuple[int, list[Update]] | Failure]:
        """Collect one update per segment from each of these clients."""
        ...

    def memory(self) -> dict[int, Memory]:
        """Return what the clients carry over, for a checkpoint; empty where clients keep it themselves."""
        ...

    def restore(self, version: int, sides: Sequence[Adapter]) -> None:
        """Let clients that keep nothing themselves hold the sides of a version, one a segment, where a run goes on."""
        ...
