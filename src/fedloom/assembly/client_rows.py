"""Which of the clients' rows are held out to score each client on."""

from __future__ import annotations

from fedloom.config import Settings
from fedloom.data.holdout import hold_out_of_clients
from fedloom.data.own_rows import OwnRows
from fedloom.data.partition import Partition
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.seeding import stream


def own_rows(
    settings: Settings, rows: Rows, tokens: TokenSet, whole: Partition
) -> tuple[Rows, TokenSet, Partition, OwnRows]:
    """Return what is left to train on, and the rows of each client on which it is scored."""
    share, seed = settings.evaluation.clients, settings.run.seed
    if share == 0.0:
        return rows, tokens, whole, OwnRows()
    split = hold_out_of_clients(whole, rows.units, share, lambda client: stream(seed, "own hold-out", client))
    owner = whole.owner_of_row()
    own = OwnRows.of(tokens.select(split.held), owner[split.held], whole.names)
    left = Partition.from_owners(owner[split.kept], whole.names, whole.how)
    return rows.select(split.kept), tokens.select(split.kept), left, own
