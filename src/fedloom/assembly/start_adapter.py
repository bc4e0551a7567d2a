"""The adapter that a run starts from: frozen beside the base, for everybody and all along, or where training begins."""

from __future__ import annotations

from pathlib import Path

from fedloom.config.input_tables import Model
from fedloom.errors import AdapterError, RunError
from fedloom.lora.layer import LoRAModel, check_covers
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import base_of, load_peft
from fedloom.methods.side import digest
from fedloom.models.load import Base


def start_adapter(model: Model) -> Adapter | None:
    """Return the adapter of ``model.adapter``; None where none is given.

    Raises:
        AdapterError: its files are absent, or are no plain low-rank adapter.
    """
    return None if model.adapter is None else load_peft(Path(model.adapter).expanduser())


def targets_of(model: Model) -> tuple[str, ...] | None:
    """Return the names or patterns of the adapted layers: left out, those of the adapter, or else None.

    Raises:
        AdapterError: as for :func:`start_adapter`.
    """
    if model.target_modules is not None or model.adapter is None:
        return model.target_modules
    return tuple(sorted(start_adapter(model) or ()))


def lay_start(model: Model, base: Base, lora: LoRAModel) -> None:
    """Put the adapter on its base where it stays frozen; where it is trained, only check that it fits.

    Raises:
        AdapterError: it is for another base, or has modules that are not adapted.
    """
    adapter = start_adapter(model)
    if adapter is None:
        return
    named = base_of(Path(str(model.adapter)).expanduser())
    trained_on = None if named is None else named[1].sha256
    if trained_on and base.revision_hash and trained_on != base.revision_hash:
        raise AdapterError(
            f"model.adapter: expected one for {base.name} (sha256 {base.revision_hash[:12]}), got one for a base of "
            f"sha256 {trained_on[:12]}; set model.base to its own base"
        )
    lacking = sorted(adapter.keys() - lora.shapes.keys())
    if lacking:
        leaves = sorted({name.rpartition(".")[2] for name in adapter})
        raise AdapterError(
            f"model.adapter: expected modules among model.target_modules, got {lacking[0]}, which is not adapted; set "
            f"model.target_modules to all of {leaves}"
        )
    try:
        check_covers(adapter, lora.shapes)
    except AdapterError as error:
        raise AdapterError(f"model.adapter: {error}; set model.base to that base") from error
    if not model.train_adapter:
        lora.set_ground(adapter)


def ground_of(model: Model, sha256: str | None) -> Adapter:
    """Return what a run of these settings had frozen beside its base; its hash is in the run's manifest.

    Raises:
        RunError: another adapter is there now.
        AdapterError: none is.
    """
    adapter = None if model.train_adapter else start_adapter(model)
    if adapter is None:
        return Adapter()
    if sha256 is not None and digest(adapter) != sha256:
        raise RunError(
            f"{model.adapter}: expected the adapter that the run started from (sha256 {sha256[:12]}), got another "
            f"(sha256 {digest(adapter)[:12]}); restore it"
        )
    return adapter
