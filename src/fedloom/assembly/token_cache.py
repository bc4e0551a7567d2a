"""Tokenised rows kept on disk between commands, under a name that is the hash of all that they are made from.

The folder is that of the variable ``FEDLOOM_CACHE``, by default ``fedloom`` in the user's cache folder
(``XDG_CACHE_HOME``, else ``~/.cache``); ``off`` keeps nothing. Nothing depends on what is there: an entry that is
damaged, of other rows, or cannot be written is as good as none. The folder is the user's alone, since tokens are rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import fedloom.data
from fedloom.data.encoding import Encoded, EncodingCounts, resolve_template
from fedloom.data.records import Records
from fedloom.data.templates import ChatTemplate
from fedloom.data.tokenizer import check_ids, fingerprint
from fedloom.data.tokens import TokenSet
from fedloom.errors import FedloomError
from fedloom.file_formats import TOKEN_CACHE
from fedloom.run_folder import durable

VARIABLE, OFF = "FEDLOOM_CACHE", "off"
MOST_BYTES = 2 << 30
"""Bytes of all entries together; what was used longest ago goes first."""
FEWEST_ROWS = 1000
"""Rows worth keeping: fewer are made into tokens in less than a second, and leave no copy of themselves."""
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_READERS = ("tokenizers", "transformers", "jinja2")
"""Packages that decide which tokens a text becomes."""
_ARRAYS = {"input_ids": np.int32, "supervised": np.bool_, "starts": np.int64, "kept": np.int64}


@dataclass(frozen=True)
class TokenCache:
    """Entries in a folder; None keeps nothing."""

    folder: Path | None
    most_bytes: int = MOST_BYTES
    fewest_rows: int = FEWEST_ROWS

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> TokenCache:
        """Return the cache that the user chose."""
        chosen = variables.get(VARIABLE, "")
        if chosen == OFF:
            return cls(None)
        with suppress(RuntimeError):  # nobody's home folder is known: nothing is kept
            usual = Path(variables.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedloom"
            return cls(Path(chosen).expanduser() if chosen else usual)
        return cls(None)

    def key(self, records: Records, tokenizer: Any, how: Mapping[str, Any]) -> str | None:
        """Return the hash of records, tokenizer, settings and code; None for what is not kept.

        ``how`` are the arguments of :func:`~fedloom.data.encoding.encode` beside those two. A tokenizer of its own code
        can do anything, so its tokens are not kept.
        """
        is_own_code = type(tokenizer).__module__.startswith("transformers_modules")
        if self.folder is None or len(records) < self.fewest_rows or is_own_code:
            return None
        wording = resolve_template(how["template"], records.shape, tokenizer, how["date"])
        if isinstance(wording, ChatTemplate) and wording.date is None:
            return None
        digest = hashlib.sha256()
        settings = {name: str(value) for name, value in how.items() if name not in ("template", "named")}
        ids = getattr(tokenizer, "num_base_ids", None)
        for part in (TOKEN_CACHE.number, _code(), fingerprint(tokenizer), ids, wording, settings, records.shape):
            digest.update(repr(part).encode() + b"\n")
        for record in records.items:
            digest.update(repr(record).encode() + b"\n")
        return digest.hexdigest()

    def read(self, key: str | None, records: Records, tokenizer: Any) -> Encoded | None:
        """Return what is kept under a key, checked; None where that is nothing, or damaged."""
        if key is None or self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, framework="np") as file:
                found, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in _ARRAYS}
            encoded = _checked(found, arrays, key, records, tokenizer)
            os.utime(path)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, FedloomError):
            return None
        return encoded

    def write(self, key: str | None, encoded: Encoded) -> None:
        """Keep tokens, and remove what was used longest ago where there is too much; a full disk is no error."""
        if key is None or self.folder is None:
            return
        tokens = encoded.tokens
        arrays = {
            "input_ids": tokens.input_ids,
            "supervised": tokens.supervised,
            "starts": tokens.starts,
            "kept": encoded.kept,
        }
        if sum(array.nbytes for array in arrays.values()) > self.most_bytes // 2:
            return
        told = {
            "key": key,
            "format": str(TOKEN_CACHE.number),
            "sha256": _digest(tokens, encoded.kept),
            "counts": json.dumps(encoded.counts.__dict__),
        }
        with suppress(OSError, FedloomError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.write_bytes(self.folder / f"{key}.safetensors", save(arrays, told))
            self._prune()

    def _prune(self) -> None:
        assert self.folder is not None
        entries = [path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name)]
        aged = sorted(((path.stat().st_mtime, path.stat().st_size, path) for path in entries), reverse=True)
        total = 0
        for _, size, path in aged:
            total += size
            if total > self.most_bytes:
                path.unlink(missing_ok=True)


def _checked(
    found: Mapping[str, str], arrays: Mapping[str, Any], key: str, records: Records, tokenizer: Any
) -> Encoded:
    """Return an entry as what it says, or raise."""
    if found["key"] != key or found["format"] != str(TOKEN_CACHE.number):
        raise ValueError("of other rows")
    if any(arrays[name].dtype != dtype or arrays[name].ndim != 1 for name, dtype in _ARRAYS.items()):
        raise ValueError("of other arrays")
    tokens, kept = TokenSet(*(arrays[name] for name in ("input_ids", "supervised", "starts"))), arrays["kept"]
    counts = EncodingCounts(**json.loads(found["counts"]))
    if _digest(tokens, kept) != found["sha256"] or len(kept) != len(tokens) or counts.num_kept != len(tokens):
        raise ValueError("damaged")
    if len(kept) == 0 or kept.min() < 0 or kept.max() >= len(records):
        raise ValueError("of other rows")
    check_ids(tokens.input_ids, tokenizer, "an entry of the cache")
    return Encoded(replace(tokens, units=records.rows.units_of(kept)), kept, counts)


def _digest(tokens: TokenSet, kept: Any) -> str:
    return hashlib.sha256(tokens.sha256().encode() + kept.astype("<i8").tobytes()).hexdigest()


@cache
def _code() -> str:
    """Return the hash of the code that makes tokens of rows: another version of it has entries of its own."""
    digest = hashlib.sha256()
    for path in sorted(Path(fedloom.data.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for package in _READERS:
        with suppress(metadata.PackageNotFoundError):
            digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()
