"""Bases whose weights are stored quantised: which package reads them, named before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedloom.errors import MissingExtraError, ModelError

_EXTRA = {"bitsandbytes": "quantized"}
"""The extra that installs a package."""

_PACKAGES: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes",),
    "bitsandbytes_4bit": ("bitsandbytes",),
    "bitsandbytes_8bit": ("bitsandbytes",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "aqlm": ("aqlm",),
    "quanto": ("optimum.quanto",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "eetq": ("kernels",),
    "higgs": ("flute",),
    "vptq": ("vptq",),
    "spqr": ("spqr_quant",),
    "auto-round": ("auto_round",),
    "quark": ("quark",),
    "mxfp4": ("kernels",),
}
"""The modules that transformers needs to read a method's weights."""

_INSTALLED_AS = {
    "compressed_tensors": "compressed-tensors",
    "optimum.quanto": "optimum-quanto",
    "flute": "flute-kernel",
    "auto_round": "auto-round",
    "quark": "amd-quark",
}


def stored_method(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a base's ``config.json`` says its weights are quantised; None where they are not."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)


def check_library(config: Mapping[str, Any], folder: Path) -> None:
    """Reject a base that is stored quantised where the package that reads it is not installed.

    Raises:
        MissingExtraError: where an extra installs it.
        ModelError: otherwise, naming the package.
    """
    method = stored_method(config)
    if method is None:
        return
    missing = [package for package in _PACKAGES.get(method, ()) if not _is_installed(package)]
    if missing and missing[0] in _EXTRA:
        raise MissingExtraError(_EXTRA[missing[0]], f"model.base: {folder}, which is stored quantised by {method},")
    if missing:
        names = " ".join(_INSTALLED_AS.get(package, package) for package in missing)
        raise ModelError(
            f"model.base: {folder} is stored quantised by {method}, which needs {names}; install it (pip install "
            f"{names}), or choose the unquantised base, with model.quantization = '4bit' if memory is short"
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
