"""The settings in a foreign adapter's ``adapter_config.json``, checked key by key, and a module's scale by them."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from fedloom.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 16 << 20
MATCHING_SECONDS = 5.0
"""Time for all patterns of a file: a thousand modules need a tenth of a second."""

_FOREIGN = (
    "use_dora",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
)
"""Settings with which peft (0.21) computes something else than ``W + s · B A``.

VeLoRA is not listed: it changes only the backward pass.
"""

_CONVERT = (
    "convert it to plain LoRA with peft's save_pretrained(folder, path_initial_model_for_weight_conversion=F), F being "
    "the adapter saved before training"
)
_CHANGES_BASE = {
    **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), _CONVERT),
    "loftq": "peft cannot convert it: train again with init_lora_weights = true",
}
"""Initialisations (by prefix) that change the base's weights. EVA, orthogonal, gaussian and MiCA do not."""

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "base_model_name_or_path": ((str,), "text"),
    "bias": ((str,), "text"),
    "init_lora_weights": ((bool, str), "true, false or a name"),
    "use_rslora": ((bool,), "true or false"),
    "fan_in_fan_out": ((bool,), "true or false"),
    "rank_pattern": ((dict,), "numbers by module"),
    "alpha_pattern": ((dict,), "numbers by module"),
    "target_modules": ((str, list), "text or a list"),
    "target_parameters": ((list,), "a list"),
}


def read_peft_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a plain LoRA adapter.

    Raises:
        AdapterError: if the file is absent, malformed, too large, of another kind of adapter, or a setting has the
            wrong type.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{folder}: expected a PEFT adapter with {CONFIG_NAME}, found none; check the path")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: expected at most {MAX_CONFIG_BYTES >> 20} MiB, got more; fetch it again")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: expected JSON, got truncated or malformed text ({error}); fetch it again"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected the settings of an adapter, got {shortened(config)}; fetch it again")
    if config.get("peft_type") != "LORA":
        kind = shortened(config.get("peft_type"))
        raise AdapterError(f"{path}: expected peft_type LORA, got {kind}; choose a LoRA adapter")
    for key, (types, expected) in _TYPES.items():
        if not isinstance(config.get(key), (*types, type(None))):
            raise AdapterError(f"{path}: expected {key} as {expected}, got {shortened(config[key])}; fetch it again")
    foreign = [key for key in _FOREIGN if config.get(key)]
    if not all(isinstance(name, str) and name.endswith(".weight") for name in config.get("target_parameters") or ()):
        foreign.append("target_parameters")  # parameters of another name, as those of experts, are no matrices
    if config.get("bias") not in (None, "none"):
        foreign.append("bias")
    if foreign:
        raise AdapterError(
            f"{path}: expected low-rank pairs only, {foreign[0]} = {shortened(config[foreign[0]])} cannot be expressed "
            "as one; choose a plain LoRA adapter"
        )
    _refuse_changed_base(path, str(config.get("init_lora_weights")))
    return config


def _refuse_changed_base(path: Path, initialisation: str) -> None:
    """Reject pairs that are not relative to the base itself: peft took their start out of it, or quantised it."""
    kind = next((kind for kind in _CHANGES_BASE if initialisation.lower().startswith(kind)), None)
    if kind is not None:
        advice = _CHANGES_BASE[kind]
        raise AdapterError(
            f"{path}: expected pairs on the unchanged base, init_lora_weights = {initialisation[:60]!r} changes the "
            f"base first; {advice}"
        )


class Scales:
    """The scale of every module by an adapter's settings, its patterns matched as peft matches them.

    A pattern is the file's own and may be made to need exponential time, so all matching together has a time limit.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self._config, self._path = config, folder / CONFIG_NAME
        self._patterns = {name: self._compiled(name) for name in ("rank_pattern", "alpha_pattern")}
        self._seconds_left = MATCHING_SECONDS
        self._parameters = frozenset(config.get("target_parameters") or ())

    def of(self, module: str, rank: int) -> float:
        """Return ``alpha / r`` (rsLoRA: ``alpha / √r``) of a module whose tensors have this rank.

        Raises:
            AdapterError: if a number is missing, is none, or is not the tensors'; if the patterns take too long.
        """
        stated = self._number("rank_pattern", "r", module)
        if stated != rank:
            raise AdapterError(
                f"{self._path.parent}: expected rank {stated:g} of {module} as {CONFIG_NAME} states, its "
                f"tensors have rank {rank}; fetch it again"
            )
        if rank < 1:
            raise AdapterError(
                f"{self._path.parent}: expected a rank of 1 or more of {module}, got {rank}; fetch it again"
            )
        alpha = self._number("alpha_pattern", "lora_alpha", module)
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def _number(self, pattern: str, default: str, module: str) -> float:
        value = self._matching(pattern, module, self._config.get(default))
        # bool is a subclass of int; an integer of hundreds of digits is no float.
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63:
            return float(value)
        raise AdapterError(
            f"{self._path}: expected {default} of {module} as a number from 0 up to 2⁶³, got {shortened(value)}; fetch "
            "it again"
        )

    def _matching(self, name: str, module: str, default: object) -> object:
        # Of a parameter peft matches the whole name.
        module = f"{module}.weight" if f"{module}.weight" in self._parameters else module
        for pattern, value in self._patterns[name]:
            begun = time.monotonic()
            try:
                found = pattern.match(module, timeout=max(1e-3, self._seconds_left))
            except (TimeoutError, MemoryError, RecursionError) as error:
                raise AdapterError(
                    f"{self._path}: expected a {name} that is matched within {MATCHING_SECONDS:.0f} s, got one that is "
                    "not; write the modules' names instead"
                ) from error
            self._seconds_left -= time.monotonic() - begun
            if found:
                return value
        return default

    def _compiled(self, name: str) -> list[tuple[regex.Pattern[str], object]]:
        compiled = []
        for key, value in (self._config.get(name) or {}).items():
            try:
                compiled.append((regex.compile(rf"(.*\.)?({key})$"), value))
            except (regex.error, OverflowError, RecursionError, MemoryError) as error:
                raise AdapterError(
                    f"{self._path}: expected regular expressions in {name}, got {shortened(key)} "
                    f"({shortened(str(error))}); correct it, or write the module's name"
                ) from error
        return compiled


def shortened(value: object) -> str:
    """Return a JSON value as it may stand in a message."""
    if value is None:
        return "none"
    try:
        return textwrap.shorten(json.dumps(value)[:1000], 60)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} beyond reason"
