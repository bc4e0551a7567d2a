"""Bases whose weights are stored quantised: which packages read them, told by their ``config.json`` alone.

Imports no torch, so that checks of a recipe may ask too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    "fbgemm_fp8": ("fbgemm_gpu",),
    "aqlm": ("aqlm",),
    "quanto": ("optimum.quanto",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "eetq": ("kernels",),
    "higgs": ("flute", "fast_hadamard_transform"),
    "vptq": ("vptq",),
    "spqr": ("spqr_quant",),
    "auto-round": ("auto_round",),
    "quark": ("quark",),
    "fp_quant": ("fp_quant",),
    "fouroversix": ("fouroversix",),
    "sinq": ("sinq",),
    "gguf": ("gguf",),
    # transformers alone: where a kernel is missing, it holds the weights unquantised.
    "fp8": (),
    "mxfp8": (),
    "mxfp4": (),
    "metal": (),
    "bitnet": (),
    "gemma": (),
}
"""The modules that transformers needs to read a method's weights. nvfp4 is not here: it reads no stored ones yet."""

_INSTALLED_AS = {
    "compressed_tensors": "compressed-tensors",
    "fbgemm_gpu": "fbgemm-gpu",
    "optimum.quanto": "optimum-quanto",
    "flute": "flute-kernel",
    "auto_round": "auto-round",
    "quark": "amd-quark",
}

UNQUANTISED = "choose the unquantised base, with model.quantization = '4bit' if memory is short"


@dataclass(frozen=True)
class Lack:
    """Why the weights of a base cannot be read here: ``packages`` that are missing, or none for an unknown method."""

    method: str
    packages: tuple[str, ...]
    extra: str | None = None

    @property
    def got(self) -> str:
        """What the base is."""
        needs = f"which needs {' '.join(self.packages)}" if self.packages else "which cannot be read here"
        return f"stored quantised by {self.method}, {needs}"

    @property
    def action(self) -> str:
        """What to do."""
        if not self.packages:
            return UNQUANTISED
        names = f"'fedloom[{self.extra}]'" if self.extra else " ".join(self.packages)
        return f"install it (pip install {names}), or {UNQUANTISED}"


def stored_method(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a base's ``config.json`` says its weights are quantised; None where they are not."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)


def lack_of(config: Mapping[str, Any]) -> Lack | None:
    """Return why the weights of a base cannot be read here, by its ``config.json``; None where they can."""
    method = stored_method(config)
    if method is None:
        return None
    if method not in _PACKAGES:
        return Lack(method, ())
    missing = [package for package in _PACKAGES[method] if not _is_installed(package)]
    if not missing:
        return None
    return Lack(method, tuple(_INSTALLED_AS.get(one, one) for one in missing), _EXTRA.get(missing[0]))


def check_library(config: Mapping[str, Any], folder: Path) -> None:
    """Reject a base that is stored quantised where the package that reads it is not installed.

    Raises:
        MissingExtraError: where an extra installs it.
        ModelError: otherwise, naming the package, or the method where it is unknown.
    """
    lack = lack_of(config)
    if lack is None:
        return
    if lack.extra is not None:
        raise MissingExtraError(lack.extra, f"model.base: {folder}, which is stored quantised by {lack.method},")
    raise ModelError(f"model.base: {folder} is {lack.got}; {lack.action}")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
