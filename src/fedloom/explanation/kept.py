"""What a run folder keeps of a round beside its record: the state after it, and the clients' uploads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedloom.assembly.round_state import read_round, standing_of
from fedloom.assembly.split_run import NUMBERS as SPLIT_NUMBERS
from fedloom.assembly.split_run import TENSORS as SPLIT_TENSORS
from fedloom.assembly.split_run import read_split_state
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import load_peft
from fedloom.methods.state import ServerState
from fedloom.methods.state_codec import TENSORS, damage_named
from fedloom.methods.traits import Traits
from fedloom.run_folder.contents import PEFT_FILES, RoundFiles
from fedloom.run_folder.reader import StoredRun

CLIENTS, UPDATE = "clients", "update.json"


@dataclass(frozen=True, eq=False)
class KeptState:
    """The state after a round.

    Attributes:
        shared: the global adapter; where one client owns all rows, its adapter.
        own: each client's own adapter, where there are several.
        server: the server's state; None of a split run.
        client_moments: by client, of the optimisers that keep them.
    """

    shared: Adapter
    own: Mapping[int, Adapter] = field(default_factory=dict)
    server: ServerState | None = None
    client_moments: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def going_on(self) -> Adapter:
        """The factors that clients go on from; where every round is fresh, what all have added."""
        start = None if self.server is None else self.server.start
        return start or self.shared


def state_after(run: StoredRun, n: int, traits: Traits) -> KeptState | None:
    """Return the state after round ``n``; None where it is not kept.

    Raises:
        RunError: it is damaged.
    """
    files, name = run.round_files(n), SPLIT_TENSORS if traits.is_cut else TENSORS
    if n < len(run.records) and not (files.folder / name).exists():
        return None
    with damage_named(files.folder):
        if traits.is_cut:
            return KeptState(read_split_state(files.read(name), files.read(SPLIT_NUMBERS)).global_adapter())
        state, memories = read_round(files)
        standing = standing_of(state, memories)
    moments = {client: memory.moments for client, memory in sorted(memories.items()) if memory.moments}
    if len(standing.own) == 1:
        return KeptState(next(iter(standing.own.values())), {}, None, moments)
    return KeptState(standing.shared, standing.own, state, moments)


def uploads_of(files: RoundFiles) -> dict[int, Adapter]:
    """Return what each client sent in a round, by client; empty where uploads are not kept.

    Raises:
        RunError: a file of one is missing or not what was written.
        AdapterError: one cannot be read.
    """
    found = {}
    names = [name.split("/") for name in files.hashes if name.startswith(f"{CLIENTS}/") and name.endswith(UPDATE)]
    for client in sorted(int(parts[1]) for parts in names):
        folder = f"{CLIENTS}/{client}"
        for file in (*PEFT_FILES, UPDATE):
            files.check(f"{folder}/{file}")
        found[client] = load_peft(files.folder / folder)
    return found
