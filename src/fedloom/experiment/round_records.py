"""A round's record as it goes into ``metrics.jsonl``, and the uploads that a run may keep."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedloom.data.groups import grouping_of
from fedloom.data.partition import Partition
from fedloom.data.sources import Rows
from fedloom.federation.intake import ClientRecord
from fedloom.federation.messages import numbers_of
from fedloom.federation.module_figures import rounded
from fedloom.federation.rounds import RoundRecord
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import save_peft
from fedloom.methods.state import Update
from fedloom.models.stock_peft import taken_for_experts
from fedloom.reporting.peak_memory import peaks_of_round
from fedloom.run_folder import durable
from fedloom.run_folder.reader import Holding, holdings_document

_RETRY = "the rounds before are kept: free space or mend the disk, then run the same command again"


def metrics_of(record: RoundRecord, method: str, names: Sequence[str]) -> dict[str, Any]:
    """Return a round as plain values, units in the names."""
    used = [client for client in record.clients if client.reason is None]
    counted = [client.stats for client in used if client.stats is not None]
    tokens = sum(stats.num_loss_tokens for stats in counted)
    nats = sum(stats.loss_nats * stats.num_loss_tokens for stats in counted)
    figures, agreement = record.figures, record.figures.agreement
    return {
        "round": record.round,
        "method": method,
        "train_loss_nats": nats / tokens if tokens else None,
        "eval": record.evaluation or None,
        "aggregation_noise": figures.aggregation_noise,
        "change_norm": figures.change_norm,
        "agreement": None if agreement is None else rounded(agreement.ratio),
        "cosine": None if agreement is None else rounded(agreement.cosine),
        "modules": [one.as_dict() for one in figures.modules],
        "num_tokens": sum(client.stats.num_tokens for client in record.clients if client.stats is not None),
        "num_loss_tokens": tokens,
        "num_trained_parameters": sum(client.num_parameters for client in used),
        "upload_bytes": sum(client.upload_bytes for client in record.clients),
        "download_bytes": sum(client.download_bytes for client in record.clients),
        "seconds": dict(record.seconds),
        **peaks_of_round(),
        "rank": record.state.global_adapter().ranks,
        "clients": [{"name": names[client.client], **client.as_dict()} for client in record.clients],
    }


def holdings_of(rows: Rows, partition: Partition, ranks: Mapping[int, int], column: str | None) -> dict[str, Any]:
    """Return who owns how much of which group, for the report; no groups where a column has too many values."""
    grouping = grouping_of(rows, column)
    holdings = []
    for client, name in enumerate(partition.names):
        owned = partition.rows_of(client)
        groups = {} if grouping is None else Counter(grouping.of_row[index] for index in owned)
        holdings.append(Holding(name, len(owned), ranks.get(client), dict(sorted(groups.items()))))
    return holdings_document(holdings, None if grouping is None else grouping.column)


class UpdateKeeper:
    """Writes every used upload as a PEFT folder beside the run, until its round takes them in."""

    def __init__(
        self, folder: Path, save: Callable[[Adapter, Path, float], None], scale_of: Callable[[int], float]
    ) -> None:
        self._folder, self._save, self._scale_of = folder, save, scale_of
        self._numbers: dict[int, dict[str, Any]] = {}

    def keep(self, update: Update) -> None:
        """Write one upload.

        Raises:
            RunError: the disk refused.
        """
        folder = self._folder / str(update.client)
        with durable.explained(f"the upload of client {update.client} in {self._folder.parent}", _RETRY):
            self._save(update.adapter, folder, self._scale_of(update.client))
        self._numbers[update.client] = numbers_of(update)

    def move_into(self, destination: Path, clients: Sequence[ClientRecord]) -> None:
        """Move the round's uploads to ``destination/<id>/``, each with its ``update.json``."""
        destination.mkdir()
        for client in clients:
            if client.client in self._numbers:
                folder = destination / str(client.client)
                shutil.move(self._folder / str(client.client), folder)
                numbers = self._numbers.pop(client.client) | {"weight": client.weight, "norm": client.norm}
                (folder / "update.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


@contextmanager
def update_keeper(
    run: Path, save: Callable[[Adapter, Path, float], None], scale_of: Callable[[int], float]
) -> Iterator[UpdateKeeper]:
    """Yield a keeper whose uploads wait in the run's folder, under a name that the next start clears away."""
    with ExitStack() as stack:
        with durable.explained(str(run), _RETRY):
            waiting = stack.enter_context(durable.temporary_folder(run))
        yield UpdateKeeper(waiting, save, scale_of)


def peft_writer(base: BaseReference, lora: LoRAModel, dropout: float) -> Callable[[Adapter, Path, float], None]:
    """Return a function that writes an adapter of this base as a PEFT folder at a scale."""
    conv1d, parameters = lora.uses_conv1d, taken_for_experts(lora.model.config, lora.shapes)

    def write(adapter: Adapter, folder: Path, scale: float) -> None:
        save_peft(adapter, folder, base_name=base, scale=scale, conv1d=conv1d, dropout=dropout, parameters=parameters)

    return write
