"""What a base's folder must and must not hold, checked before anything of it is loaded.

A base is what its configuration and its files of weights say. Whatever else would act by itself is refused by name: an
adapter next to the weights, which transformers would add to them; Python code; kernels fetched from the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedloom.data.hub_refusal import hub_refusal
from fedloom.data.own_code import named_code_refusal, own_code_refusal
from fedloom.errors import ModelError
from fedloom.models.stored_quantization import check_library
from fedloom.wording import first_line

_SNAPSHOT = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
_CODE = ["*.py"]
_ADAPTER_FILES = "adapter_*"


def resolve_folder(name_or_path: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Return the folder of a base, fetching a hub name's snapshot if it is not cached.

    Raises:
        ModelError: if there is neither such a folder nor such a name on the hub.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = name_or_path.startswith((".", "/")) or folder.exists()
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path):
        raise ModelError(
            f"model.base: expected a folder or a hub name, got {name_or_path!r}, which does not exist; check the path"
        )
    wanted = [*_SNAPSHOT, *(_CODE if trust_remote_code else ())]
    return fetched(name_or_path, revision, "model.base", wanted, [_ADAPTER_FILES])


def fetched(name: str, revision: str | None, what: str, wanted: list[str], unwanted: Sequence[str] = ()) -> Path:
    """Return the folder of a snapshot from the hub, out of the cache where it is there.

    Raises:
        ModelError: it could not be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=list(unwanted)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(hub_refusal(what, "a folder or a name on the hub", name, error)) from error


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """Return the model's configuration, checked to be a causal LM's and to bring nothing that acts by itself.

    Raises:
        ModelError: if it is absent or malformed, of another kind of model, or needs code that is not trusted; if an
            adapter is next to it, or it is stored quantised and the library that reads that is not installed.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = folder / "config.json"
    _refuse_adapter(folder)
    if not path.is_file():
        raise ModelError(
            f"model.base: expected a Hugging Face folder with config.json, found none in {folder}; check the path"
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        kind, has_code = given.get("model_type"), trust_remote_code and "auto_map" in given
        if not trust_remote_code and (kernel := next(_kernels(given), None)) is not None:
            raise named_code_refusal(folder, f"the kernel {kernel} in its config.json")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OSError, StrictDataclassError) as error:
        if (refusal := own_code_refusal(error, folder)) is not None:
            raise refusal from error
        raise ModelError(
            f"model.base: {path} is not a model's configuration: {first_line(error)}; fetch the model again"
        ) from error
    if not has_code and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model.base: expected a causal language model, {folder} holds a {kind!r}; choose another base"
        )
    check_library(given, folder)
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files, each checked to be whole, and all shards of an index checked to exist.

    Raises:
        ModelError: if there are none, or one is absent, truncated or corrupt.
    """
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ModelError(f"model.base: {index} names {missing[0]}, which is not in {folder}; fetch the model again")
    files = sorted(folder / name for name in named) if named else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model.base: expected weights as *.safetensors in {folder}, found none; "
            "convert other formats with transformers' save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model.base: {file} is truncated or corrupt ({error}); fetch the model again") from error
    return files


def _refuse_adapter(folder: Path) -> None:
    """Reject an adapter's files: transformers would load them onto the base without a word."""
    found = sorted(path.name for path in folder.glob(_ADAPTER_FILES) if path.is_file())
    if not found:
        return
    names = ", ".join(found)
    if (folder / "config.json").is_file():
        raise ModelError(
            f"model.base: expected a base alone, {folder} also holds an adapter ({names}), which would be loaded onto "
            "the weights; take these files out of the folder"
        )
    raise ModelError(
        f"model.base: expected a base with config.json, {folder} holds an adapter ({names}); name the base that it was "
        "trained on"
    )


def _kernels(value: Any) -> Iterator[str]:
    """Yield every implementation in a configuration that names a repository: transformers would run its code."""
    if isinstance(value, list):
        for one in value:
            yield from _kernels(one)
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        texts = [one] if isinstance(one, str) else one.values() if isinstance(one, dict) else ()
        if str(key).endswith("_implementation"):
            yield from (text for text in texts if isinstance(text, str) and "/" in text)
        yield from _kernels(one)
