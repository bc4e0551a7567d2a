"""What a run trained on, counted from its records, and whether the methods of a table trained on as much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.data.batches import num_rows_read
from fedloom.methods import table
from fedloom.reporting.metrics import ROWS_TRAINED
from fedloom.reporting.tables import Comparison
from fedloom.run_folder.reader import StoredRun

EQUAL = 0.01
"""Share by which rows may differ and count as equal: a last batch holds what is left."""


def with_rows_trained(run: StoredRun) -> list[Mapping[str, Any]]:
    """Return a run's records, each with the rows that its round trained on, a row as often as it was read.

    They follow from each client's rows and steps, and the batch size. Updates that were dropped are counted too.
    """
    batch_size = run.config.get("training", {}).get("batch_size")
    if not batch_size:
        return list(run.records)
    # The rows of a cut model follow one another without a gap: none of its batches is smaller.
    is_cut = table.has(run.method) and table.traits_of(run.method).is_cut
    found = []
    for record in run.records:
        clients = [one for one in record.get("clients") or () if one.get("num_rows") and one.get("num_steps")]
        counts = [
            one["num_steps"] * batch_size if is_cut else num_rows_read(one["num_rows"], batch_size, one["num_steps"])
            for one in clients
        ]
        found.append({**record, ROWS_TRAINED.path[0]: sum(counts)} if counts else record)
    return found


def unequal_rows(comparison: Comparison) -> str | None:
    """Say which methods trained on how many rows, where they differ by more than :data:`EQUAL`; None where not."""
    cells = {method: row.get(ROWS_TRAINED.key) for method, row in comparison.cells.items()}
    rows = {method: cell.mean for method, cell in cells.items() if cell is not None}
    if not rows or max(rows.values()) <= (1 + EQUAL) * min(rows.values()):
        return None
    counts = ", ".join(f"{method} {mean:,.0f}" for method, mean in sorted(rows.items(), key=lambda item: item[1]))
    return f"the methods did not train on equally many rows, so their losses are not at equal budget: {counts}"
