"""Open a result, that is, a run folder or any PEFT folder, over its base.

A run's base is the one its settings name, a PEFT folder's the one it names itself; either is checked by hash where the
files hold one, and can be given another location. The weights of the base never change: an adapter is added next to
them and removed again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom import config
from fedloom.config import Settings
from fedloom.config.conduct import Engine
from fedloom.data.own_code import TRUST_VARIABLE
from fedloom.errors import AdapterError, MissingExtraError, ModelError, RunError
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.layer import LoRAModel, check_covers
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import base_of, load_peft
from fedloom.methods.traits import GRADIENT
from fedloom.models.load import Base, load_base
from fedloom.models.row_attention import choose_attention
from fedloom.models.threads import compute_with
from fedloom.results.chosen_round import RESULT, adapters_after, run_until
from fedloom.run_folder.contents import ADAPTER, check_in_run
from fedloom.run_folder.manifest import MANIFEST
from fedloom.run_folder.reader import StoredRun, check_result_folder, missing_adapters, read_run
from fedloom.run_folder.run_date import date_of
from fedloom.training.verified_head import obstacle
from fedloom.wording import resuming


@dataclass(frozen=True, eq=False)
class Found:
    """The contents of a result's folder, read without loading a base.

    ``adapters`` is empty where training added nothing (the method ``base``); ``settings`` and ``run`` are None for a
    PEFT folder; ``notes`` are for people. ``base_name`` is where the base is looked for, ``reference`` what others may
    know of it.
    """

    path: Path
    adapters: Mapping[str, Adapter]
    base_name: str | None
    settings: Settings | None = None
    run: StoredRun | None = None
    notes: tuple[str, ...] = ()
    reference: BaseReference | None = None


@dataclass(frozen=True, eq=False)
class OpenedResult:
    """A result over its base, which ``lora`` wraps."""

    found: Found
    base: Base
    lora: LoRAModel

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name."""
        return self.found.adapters

    @property
    def settings(self) -> Settings | None:
        """The run's settings; None for a PEFT folder."""
        return self.found.settings

    def use(self, name: str | None) -> LoRAModel:
        """Put one adapter on the base, or none, and return the model that the next passes go through."""
        adapter = None if name is None else self.adapters[name]
        self.lora.set_side(adapter)
        self.lora.route_all(None)
        return self.lora


def open_result(
    path: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    client: int | None = None,
    round: int | str | None = None,
    device: str | None = None,
) -> OpenedResult:
    """Open a run folder or a PEFT folder over its base.

    ``base`` and ``tokenizer`` take the place of those that the run's settings or the PEFT folder name. ``client``
    chooses one client's adapter where each has its own, ``round`` the model after a round of a run whose state is kept:
    its number, or ``best``.

    Raises:
        RunError: there is nothing of the kind, or the run has not completed a round.
        AdapterError: the adapter is corrupt, or for another base.
        ModelError: the base cannot be loaded, or is not the one that the run trained on.
    """
    return over_base(of_client(find_result(Path(path), round), client), base, tokenizer, device)


def over_base(
    found: Found, base: str | Path | None = None, tokenizer: str | Path | None = None, device: str | None = None
) -> OpenedResult:
    """Put what was found over its base; what can be refused without a base is refused before.

    Raises:
        AdapterError: the adapter is for another base.
        ModelError: the base cannot be loaded, or is not the one that the run trained on.
    """
    loaded = load_base_of(found, base, tokenizer, device)
    return OpenedResult(found, loaded, wrap(found, loaded))


def find_result(path: Path, round: int | str | None = None) -> Found:
    """Read the adapters of a run folder, after a round if one is chosen, or of a PEFT folder.

    Raises:
        RunError: it is neither, or a run without a completed round, or without the one that is chosen.
        AdapterError: an adapter's files are corrupt.
    """
    check_result_folder(path)
    if (path / MANIFEST).exists():
        return _find_run(path, round)
    if round is not None:
        raise RunError(f"--round {round}: expected a run, {path} is an adapter; drop --round")
    return _find_adapter(path)


def of_client(found: Found, client: int | None) -> Found:
    """Keep the adapter of one client; None keeps all adapters.

    Raises:
        RunError: the adapter is shared, or that client has none.
    """
    if client is None:
        return found
    name = f"client-{client}"
    if name in found.adapters:
        return replace(found, adapters={name: found.adapters[name]})
    if RESULT in found.adapters or not found.adapters:
        raise RunError(f"--client {client}: {found.path} has no adapter per client; drop --client")
    known = ", ".join(name.removeprefix("client-") for name in found.adapters)
    raise RunError(
        f"--client {client}: expected one of {known}, the clients of {found.path}, got {client}; choose one of these"
    )


def load_base_of(
    found: Found, base: str | Path | None, tokenizer: str | Path | None, device: str | None = None, **changes: Any
) -> Base:
    """Load the base of a result; ``changes`` override the run's dtype and quantization.

    A folder may be a stranger's, so nothing in it can allow the base's own code: only the environment does, by
    FEDLOOM_TRUST_REMOTE_CODE.

    Raises:
        ModelError: it cannot be loaded, or has another hash than the one that the run trained on.
    """
    name = base or found.base_name
    if name is None:
        raise ModelError(f"{found.path}: the adapter does not name its base; give it with --base FOLDER_OR_HUB_NAME")
    if base is None and found.run is None and _is_elsewhere(found):
        raise ModelError(
            f"{found.path}: expected its base, a folder called {name!r}, found none here; give it with --base FOLDER"
        )
    options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": "auto", "device": device or "auto"}
    options["trust_remote_code"] = bool(os.environ.get(TRUST_VARIABLE))
    if found.settings is not None:
        model = found.settings.model
        options |= {"dtype": model.dtype, "quantization": model.quantization, "tokenizer": tokenizer or model.tokenizer}
        options |= {"device": device or model.device, "attention": model.attention}
        if not base:  # the run's revision belongs to the run's base, not to another one
            options |= {"revision": model.revision}
    compute_with((Engine() if found.settings is None else found.settings.engine).threads)
    try:
        loaded = load_base(name, **(options | changes))
    except MissingExtraError:
        raise
    except ModelError as error:
        if base is not None:
            raise
        raise ModelError(
            f"{found.path}: its base {found.base_name!r} cannot be loaded from here: {error}; "
            "if it is elsewhere, give it with --base FOLDER"
        ) from error
    _check_identity(found, loaded)
    if found.settings is None:
        _choose_working_attention(loaded)
    return loaded


def _choose_working_attention(base: Base) -> None:
    """Let rows be padded where the base cannot run packed: a PEFT folder does not say how it was trained."""
    if obstacle(base.model, "packed") is not None and obstacle(base.model, "padded") is None:
        choose_attention(base.model, "padded")


def wrap(found: Found, base: Base) -> LoRAModel:
    """Wrap the modules of the base that the adapters are for.

    Raises:
        AdapterError: an adapter is for another base.
    """
    modules = sorted({name for adapter in found.adapters.values() for name in adapter})
    try:
        lora = LoRAModel(base.model, modules)
        for adapter in found.adapters.values():
            check_covers(adapter, lora.shapes)
    except (ModelError, AdapterError) as error:
        raise AdapterError(
            f"{found.path}: the adapter is for another base than {base.name}: {error}; give its own with --base FOLDER"
        ) from error
    return lora


def unfinished_note(run: StoredRun) -> str:
    """Return how far a run is, and how to finish it."""
    planned = run.config.get("federation", {}).get("num_rounds", "?")
    if isinstance(planned, int) and run.config.get("method", {}).get("initialisation") == GRADIENT:
        planned += 1
    return f"{run.path} has not finished (round {len(run.records)} of {planned}); finish it with: {resuming(run.path)}"


def _find_adapter(path: Path) -> Found:
    """Read a PEFT folder; one that is part of a run has the base that the run's settings name."""
    run, adapter, named = check_in_run(path), load_peft(path), base_of(path)
    name, reference = named or (None, None)
    if run is not None:
        name = config.load(run / "config.json", also=()).model.base
    return Found(path, {RESULT: adapter}, name, reference=reference)


def _is_elsewhere(found: Found) -> bool:
    """Whether the files name a folder by its name alone, and none of that name is here: it is not one on the hub."""
    reference = found.reference
    is_bare = reference is not None and reference.is_folder and found.base_name == reference.name
    return is_bare and not Path(str(found.base_name)).is_dir()


def _find_run(path: Path, round: int | str | None) -> Found:
    run = read_run(path)
    settings = config.load(path / "config.json", also=()).on(date_of(run.manifest))
    reference = BaseReference.of(settings.model.base, run.manifest["identity"].get("base_sha256"))
    if round is not None:
        run = run_until(run, round)
        return Found(path, adapters_after(run, settings.model), settings.model.base, settings, run, (), reference)
    if run.finished is not None:
        if missing := missing_adapters(path, run.finished):
            raise RunError(
                f"{missing[0]}: expected the adapter that this run wrote, found none; write it again with: "
                f"{resuming(path)}"
            )
        return Found(path, _finished_adapters(run), settings.model.base, settings, run, (), reference)
    if not run.records:
        raise RunError(f"{unfinished_note(run)}; there is no round to use yet")
    adapters, notes = adapters_after(run, settings.model), (unfinished_note(run),)
    return Found(path, adapters, settings.model.base, settings, run, notes, reference)


def _finished_adapters(run: StoredRun) -> dict[str, Adapter]:
    found = {}
    for name in (run.finished or {}).get("adapters", ()):
        run.check_adapter(name)
        found[RESULT if name == ADAPTER else Path(name).name] = load_peft(run.path / name)
    return found


def _check_identity(found: Found, base: Base) -> None:
    trained_on = None if found.reference is None else found.reference.sha256
    if trained_on is not None and trained_on != base.revision_hash:
        raise ModelError(
            f"{found.path}: expected the base it was trained on (sha256 {trained_on[:12]}), got {base.name} "
            f"(sha256 {base.revision_hash[:12]}); give the right one with --base FOLDER"
        )
