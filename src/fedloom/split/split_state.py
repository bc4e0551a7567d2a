"""What a split run carries from one aggregation to the next, whole: enough to stop anywhere and go on the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedloom.errors import RunError
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import ServerState, Standing
from fedloom.methods.state_codec import state_from, state_numbers, state_tensors


@dataclass(frozen=True, eq=False)
class SplitState:
    """The server's state after a number of aggregations; never changed, only replaced.

    Attributes:
        round: aggregations completed.
        segments: one state of the strategy per segment of modules that clients train.
        server: the adapter of the modules that the server alone trains, at the server's rank.
        server_memory: the moments of the server's optimiser.
        residuals: what rounding of gradients still owes each client (error feedback).
        clients: what each client carries over, where that is kept here.

    The cache of frozen clients' activations is not part of it: after a resume every row crosses once more.
    """

    round: int
    segments: tuple[ServerState, ...]
    server: Adapter
    server_memory: Mapping[str, Tensor] = field(default_factory=dict)
    residuals: Mapping[int, Tensor] = field(default_factory=dict)
    clients: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def global_adapter(self) -> Adapter:
        """Return everything that training has added, both halves, as one adapter for the uncut base."""
        pairs: dict[str, Pair] = {}
        for segment in self.segments:
            pairs.update(segment.global_adapter())
        return Adapter({**pairs, **self.server})

    def standing(self) -> Standing:
        """Return both halves as one model of the uncut base: what is evaluated, kept and exported."""
        return Standing(self.round, self.global_adapter())

    def side(self) -> Adapter:
        """Return what every party adds to the frozen base, of all segments."""
        return Adapter({name: pair for segment in self.segments for name, pair in segment.side.items()})

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as a flat map of tensors and a record that JSON can hold."""
        tensors = _prefixed("server", self.server.as_tensors()) | _prefixed("server_memory", self.server_memory)
        tensors |= {f"residuals/{client}": residual for client, residual in self.residuals.items()}
        for client, memory in self.clients.items():
            tensors |= _prefixed(f"clients/{client}", memory)
        numbers: dict[str, Any] = {"round": self.round, "segments": []}
        for index, segment in enumerate(self.segments):
            tensors |= _prefixed(f"segments/{index}", state_tensors(segment))
            numbers["segments"].append(state_numbers(segment))
        return tensors, numbers

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> SplitState:
        """Rebuild a state from :meth:`to_tensors`.

        Raises:
            RunError: if a part is missing.
        """
        try:
            clients: dict[int, dict[str, Tensor]] = {}
            for key, tensor in _under("clients", tensors).items():
                client, _, name = key.partition("/")
                clients.setdefault(int(client), {})[name] = tensor
            return cls(
                round=numbers["round"],
                segments=tuple(
                    state_from(_under(f"segments/{index}", tensors), segment)
                    for index, segment in enumerate(numbers["segments"])
                ),
                server=Adapter.from_tensors(_under("server", tensors)),
                server_memory=_under("server_memory", tensors),
                residuals={int(key): tensor for key, tensor in _under("residuals", tensors).items()},
                clients=clients,
            )
        except (KeyError, ValueError) as problem:
            raise RunError(
                f"expected a whole split checkpoint, got one without {problem}; start over with --fresh"
            ) from problem


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
