"""Check an exported adapter with stock peft on its base's configuration, or say why that was not possible."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedloom import embedded
from fedloom.data.own_code import TRUST_VARIABLE
from fedloom.errors import ModelError
from fedloom.models.base_folder import read_config
from fedloom.models.stock_peft import not_read
from fedloom.results.opened_result import Found

_NOT_CHECKED = "not checked with stock peft"


def check_with_peft(found: Found, folder: Path, base: str | Path | None) -> tuple[str | None, str | None]:
    """Return what stock peft does not read of an adapter's folder, and why it was not asked; None for each that is not.

    ``base`` takes the place of the base that the result names: a folder, or a hub name whose files are cached.

    Raises:
        ModelError: ``base`` is given and its configuration is not here.
    """
    name = found.base_name if base is None else str(base)
    if not name:
        return None, f"{_NOT_CHECKED}: the adapter does not name its base; give it with --base FOLDER"
    place = _folder_of(name)
    if place is None and base is not None:
        raise ModelError(
            f"--base: expected a folder with config.json, or a hub name in the cache, got {name!r}; check it"
        )
    if place is None:
        return None, f"{_NOT_CHECKED}: its base {name!r} is not on this machine; give its place with --base FOLDER"
    trusted = bool(os.environ.get(TRUST_VARIABLE))
    try:
        config: Any = read_config(place, trusted)
    except ModelError as error:
        if base is not None:
            raise
        return None, f"{_NOT_CHECKED}: {error}"
    return not_read(folder, config, trust_remote_code=trusted), None


def _folder_of(name: str) -> Path | None:
    """Return the folder on this machine with a base's configuration; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(embedded.base_path(name)).expanduser()
    if (folder / "config.json").is_file():
        return folder
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no hub name
        return None
    return Path(cached).parent if isinstance(cached, str) else None
