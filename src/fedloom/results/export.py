"""Write a result for other tools as a PEFT adapter, at the rank they accept, with its card."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from fedloom.lora.algebra import distance, norm
from fedloom.lora.peft_files import parameters_of, save_peft
from fedloom.results.card import adapter_card
from fedloom.results.exported import (
    CARD,
    Exported,
    adapter_folder,
    at_rank,
    chosen_result,
    dtype_named,
    is_conv1d,
    only_adapter,
    own_folder,
    publish,
)
from fedloom.results.opened_result import find_result
from fedloom.results.peft_check import check_with_peft
from fedloom.results.serving_files import copy_serving_files
from fedloom.results.serving_tools import fitted, needs_of, refuse_unread, tool_named
from fedloom.run_folder import durable
from fedloom.run_folder.contents import read_object
from fedloom.run_folder.manifest import read_manifest


def export_adapter(
    source: str | Path,
    to: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    client: int | None = None,
    round: int | str | None = None,
    dtype: str = "float32",
    tool: str | None = None,
) -> Exported:
    """Write a run's result as one PEFT adapter on the untouched base, with a model card.

    With ``rank`` every module gets exactly that rank: compressed by the best approximation there is (Eckart–Young), or
    padded with zeros, so the file needs no rank pattern and any server takes it. What is written is loaded with stock
    peft on the base's configuration, which is looked for where the result says, or at ``base``. ``round`` chooses the
    model after a round whose state the run keeps: its number, or ``best``. For a ``tool`` (``peft``, ``vllm``,
    ``gguf``) its rules are checked, and what it needs is said.

    Raises:
        RunError: the run has not finished, has an adapter per client and none is chosen, or ``to`` holds files.
        AdapterError: there is nothing to export, ``rank`` is not a whole number from 1 to the largest rank, or the
            tool does not take the adapter.
        ModelError: ``base`` is given and its configuration is not there.
    """
    asked = tool_named(tool)
    found, to = chosen_result(Path(source), client, round), Path(to)
    adapter, own = only_adapter(found), own_folder(found)
    kept, errors = at_rank(adapter, rank)
    kept = fitted(kept, asked, conv1d=is_conv1d(own))
    cast = kept.to(dtype_named(dtype))
    cast_error = 0.0 if dtype == "float32" else distance(kept, cast.to(torch.float32))
    exported = Exported(to, "adapter", dtype, cast.ranks, norm(adapter), math.hypot(*errors.values()), cast_error)
    exported = replace(exported, needs=tuple(needs_of(asked, cast, to, found.reference)))

    def write(folder: Path) -> None:
        nonlocal exported
        reference, parameters = found.reference or "", parameters_of(own)
        save_peft(cast, folder, base_name=reference, conv1d=is_conv1d(own), dropout=0.0, parameters=parameters)
        unread, unchecked = check_with_peft(found, folder, base)
        refuse_unread(asked, unread)
        exported = replace(exported, unread=unread)
        copy_serving_files(own, folder)
        (folder / CARD).write_text(adapter_card(found, exported.lines(), exported.is_exact), encoding="utf-8")
        exported = replace(exported, unchecked=unchecked)  # of no use to whoever reads the card

    publish(to, write)
    return exported


def write_cards(run: Path) -> None:
    """Put a model card beside every adapter of a finished run that has none yet."""
    names = read_object(run, read_manifest(run), "finished.json").get("adapters", ())
    if all((run / name / CARD).exists() for name in names):
        return
    found = find_result(run)
    for name, adapter in found.adapters.items():
        folder = adapter_folder(run, name)
        written = Exported(folder, "adapter", "float32", adapter.ranks, norm(adapter), 0.0, 0.0)
        alone = replace(found, adapters={name: adapter})
        card = adapter_card(alone, written.lines(), written.is_exact)
        with durable.explained(str(folder / CARD), "free space, then run the same command again"):
            durable.write_bytes(folder / CARD, card.encode())
