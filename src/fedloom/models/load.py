"""Load a causal language model as the frozen base of a run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from fedloom import embedded
from fedloom.data.own_code import own_code_refusal
from fedloom.data.tokenizer import load_tokenizer, set_vocabulary
from fedloom.errors import MissingExtraError, ModelError
from fedloom.models.base_folder import read_config, resolve_folder, weight_files
from fedloom.models.fused import fuse_operators
from fedloom.models.quantized_layers import is_quantized, keep_trainable
from fedloom.models.row_attention import Attention, choose_attention
from fedloom.models.stored_quantization import UNQUANTISED, stored_method
from fedloom.models.threads import BUILDING
from fedloom.wording import first_line

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["none", "4bit", "8bit"]

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}
_QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen causal LM in evaluation mode, its tokenizer, and what it is.

    ``revision_hash`` is the sha256 of ``config.json`` and the weights, so two bases of one hash are one base wherever
    their files lie and whatever they are called.
    """

    model: Any
    tokenizer: Any
    name: str
    revision_hash: str
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class BaseFolder:
    """A base as it lies on disk, checked to be a whole causal LM's; no weight has been read.

    ``is_trusted`` says whether Python code that comes with it may run.
    """

    name: str
    path: Path
    config: Any
    tokenizer: Any
    device: torch.device
    weights: tuple[Path, ...]
    is_trusted: bool = False

    @cached_property
    def revision_hash(self) -> str:
        """As that of :class:`Base`; all weights are read for it, once."""
        return _identity([self.path / "config.json", *self.weights])


def find_base(
    name_or_path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> BaseFolder:
    """Find a base and check all that can be without its weights; arguments are those of :func:`load_base`.

    Raises:
        ModelError: if there is no such model or device, it is incomplete or corrupt, it is not a causal LM, it has no
            tokenizer or one that does not fit, or it needs code of its own that is not trusted.
    """
    folder = resolve_folder(str(embedded.base_path(name_or_path)), revision, trust_remote_code)
    config = read_config(folder, trust_remote_code)
    weights = weight_files(folder)
    place = choose_device(device)
    loaded = _load_tokenizer(folder, tokenizer, trust_remote_code)
    set_vocabulary(loaded, config.get_text_config().vocab_size)
    return BaseFolder(str(name_or_path), folder, config, loaded, place, tuple(weights), trust_remote_code)


def load_base(
    name_or_path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: Dtype = "float32",
    device: str = "auto",
    quantization: Quantization = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: Attention = "packed",
) -> Base:
    """Load a causal LM, frozen and in evaluation mode: a folder, a hub name, or ``embedded``, the package's own.

    Weights are read from safetensors only. ``tokenizer`` is a folder, a hub name or ``bytes``; None takes the base's
    own. ``dtype="auto"`` is the weights' own; ``device="auto"`` the first available of cuda, mps, cpu. With
    ``quantization`` the linear layers are held in 4 or 8 bits and ``dtype`` is that of the activations.
    Python code that comes with a base or tokenizer is run only with ``trust_remote_code``; nothing is ever asked.
    ``attention`` says how rows share a pass: packed without padding, or padded, by the model's own attention.

    Raises:
        ModelError: if there is no such model, dtype or quantization, it is incomplete or corrupt, it is not a causal
            LM, it has no tokenizer, or it needs code of its own that is not trusted.
        MissingExtraError: if ``quantization`` is asked for without bitsandbytes.
    """
    if dtype not in DTYPES or quantization not in _QUANTIZATIONS:
        raise ModelError(
            f"load_base: expected dtype {', '.join(DTYPES)} and quantization {', '.join(_QUANTIZATIONS)}, got "
            f"{dtype!r} and {quantization!r}; name one of each"
        )
    found = find_base(
        name_or_path, tokenizer=tokenizer, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    digest = found.revision_hash  # of what is about to be read
    model = _load_model(found.path, found.config, DTYPES[dtype], found.device, quantization, trust_remote_code)
    model.requires_grad_(False).eval()
    fuse_operators(model)
    choose_attention(model, attention)
    return Base(model, found.tokenizer, found.name, digest, model.dtype, found.device)


def choose_device(device: str) -> torch.device:
    """Return the device of that name, or the best available one.

    Raises:
        ModelError: if it is not available.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    kind, _, index = device.partition(":")
    too_high = kind == "cuda" and index.isdigit() and int(index) >= torch.cuda.device_count()
    if not present.get(kind, False) or too_high or (index and not index.isdigit()):
        here = ", ".join(name for name, there in present.items() if there)
        raise ModelError(
            f"model.device: expected auto or a device of this machine ({here}), got {device!r}; choose one of these"
        )
    return torch.device(device)


def _load_tokenizer(folder: Path, tokenizer: str | Path | None, trust_remote_code: bool) -> Any:
    if tokenizer is None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"model.base: {folder} has no tokenizer; set model.tokenizer to a folder or hub name, or to 'bytes' if its "
            "token ids are bytes"
        )
    return load_tokenizer(folder if tokenizer is None else tokenizer, trust_remote_code=trust_remote_code)


def _load_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype | str,
    device: torch.device,
    quantization: Quantization,
    trust_remote_code: bool,
) -> Any:
    """Read the weights into the model, all of them.

    Raises:
        ModelError: if a weight is absent from the files, or does not fit.
    """
    from transformers import AutoModelForCausalLM

    method = stored_method(config.to_dict())
    if method is not None and quantization != "none":
        raise ModelError(
            f"model.quantization: expected none with a base that is stored quantised (by {method}), got "
            f"{quantization!r}; drop it, or choose the unquantised base"
        )
    extra = _quantized(quantization, dtype, config)
    placed = {"device_map": {"": device}} if extra else {}
    try:
        with BUILDING, bars_on_terminals_only():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **placed,
                **extra,
            )
    except ImportError as error:
        action = "install it" if method is None else f"install it, or {UNQUANTISED}"
        raise ModelError(
            f"model.base: expected what {folder} needs, it is missing: {first_line(error)}; {action}"
        ) from error
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        if (refusal := own_code_refusal(error, folder)) is not None:
            raise refusal from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        action = "fetch the model again" if method is None else UNQUANTISED
        raise ModelError(f"model.base: the weights in {folder} do not load: {reason}; {action}") from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise ModelError(f"model.base: the weights in {folder} lack {name!r}; fetch the model again")
    if is_quantized(model):
        keep_trainable(model)
    return model if extra else model.to(device)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers out of logs and pipes."""
    if sys.stderr.isatty():
        yield
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def check_quantization(quantization: Quantization) -> None:
    """Check that what quantises a base while it is loaded is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise MissingExtraError("quantized", f"model.quantization = {quantization!r}")


def _quantized(quantization: Quantization, dtype: torch.dtype | str, config: Any) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to quantise while loading."""
    check_quantization(quantization)
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    compute = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None) or torch.bfloat16
    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    }


def _identity(files: list[Path]) -> str:
    """Return the sha256 over the files' names and contents."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            whole.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
