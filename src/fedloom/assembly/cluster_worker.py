"""What a worker of a cluster is made of: settings as plain values and rows as arrays, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.assembly.inputs import Inputs, Workshop
from fedloom.assembly.round_plan import strategy_of, training_of
from fedloom.clients.shared_base import SharedBase
from fedloom.config import Settings, resolve
from fedloom.config.input_tables import Model
from fedloom.data.tokens import TokenSet
from fedloom.engines.ray_worker import Station
from fedloom.federation.blob import WireDtype
from fedloom.lora.layer import LoRAModel
from fedloom.methods.side import digest
from fedloom.methods.strategy import Cohort
from fedloom.models.load import Base
from fedloom.run_folder.manifest import versions

COMPARED = ("fedloom", "torch", "transformers")
"""Packages whose version a worker has in common with the driver: results depend on them."""


def document_of(settings: Settings) -> dict[str, Any]:
    """Return settings as a worker reads them: paths that lead to the same place from any folder, any of its GPUs."""
    model = settings.model
    document: dict[str, Any] = settings.as_dict()
    paths = Model(
        base=_placed(model.base),
        tokenizer=model.tokenizer and _placed(model.tokenizer),
        adapter=model.adapter and _placed(model.adapter),
    )
    own = {"device": model.device.partition(":")[0]}
    document["model"] |= paths.model_dump(mode="json", exclude_unset=True) | own
    return document


def _placed(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def arrays_of(inputs: Inputs) -> list[NDArray[Any]]:
    """Return the rows and their owners as arrays."""
    tokens, partition = inputs.tokens, inputs.partition
    units = np.arange(len(tokens)) if tokens.units is None else tokens.units
    return [tokens.input_ids, tokens.supervised, tokens.starts, units, partition.rows, partition.starts]


def furnish(document: dict[str, Any], arrays: Sequence[NDArray[Any]]) -> Station:
    """Load the base and make the clients of a worker; rows stay where they are, in the machine's shared memory."""
    settings = resolve(document, "the driver's settings", also=())
    base, lora = Workshop().base(settings)
    tokens, (rows, starts) = TokenSet(*arrays[:4]), arrays[4:]

    def rows_of(client: int) -> TokenSet:
        return tokens.select(rows[starts[client] : starts[client + 1]])

    ranks, seed = settings.client_ranks, settings.run.seed
    half = strategy_of(settings, Cohort(lora.shapes, max(ranks), ranks.__getitem__, seed)).client
    shared = SharedBase(lora, rows_of, training_of(settings), seed, half)
    return Station(shared, WireDtype(settings.wire.dtype), proof_of(base, lora))


def proof_of(base: Base, lora: LoRAModel) -> dict[str, Any]:
    """Return what has to be the same for the results to be."""
    device = next(lora.model.parameters()).device.type
    known = versions()
    return {
        "base_sha256": base.revision_hash,
        "adapter_sha256": digest(lora.ground),
        "device": device,
        **{name: known[name] for name in COMPARED},
    }


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """Say how a worker differs from this process; None where it does not."""
    for name, value in here.items():
        if there[name] != value:
            mine, other = str(value)[:12], str(there[name])[:12]
            return f"a worker on {there['node']}: expected {name} {mine}, as here, got {other}"
    return None
