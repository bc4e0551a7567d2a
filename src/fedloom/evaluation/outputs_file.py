"""The file decoded outputs are appended to: a first line with the settings, then one prompt and its output per line.

Every line but the first carries a hash over itself and the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedloom.data.json_rows import rows_of_lines
from fedloom.errors import EvaluationError
from fedloom.file_formats import DECODED_OUTPUTS

_FORMAT = "fedloom_outputs"
_HASH = "sha256"


@dataclass
class OutputsFile:
    """What is decoded already, and where more goes; ``path`` None keeps nothing."""

    path: Path | None
    outputs: dict[str, tuple[str, bool]] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, settings: Any, model_id: str, frame: str = "") -> OutputsFile:
        """Read what a previous run left, or begin the file; ``frame`` is the tag of where its answers end.

        A last line cut short by an interruption is taken off: its prompt is decoded again.

        Raises:
            EvaluationError: the file is of another model, settings or format, or holds no outputs; nothing in it
                was changed.
        """
        if path is None:
            return cls(None)
        header = {_FORMAT: DECODED_OUTPUTS.number, "model": model_id, "settings": asdict(settings)}
        header |= {"frame": frame} if frame else {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and _line(header).encode().startswith(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_line(header), encoding="utf-8")
            return cls(path, header=header)
        found, outputs = _read(path, whole)
        if found != header:
            raise EvaluationError(f"{path}: expected outputs of {header}, found those of {found}: choose another file")
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        return cls(path, outputs, header)

    def append(self, rows: Sequence[tuple[str, str, bool]]) -> None:
        """Add prompts with their outputs."""
        self.outputs.update({prompt: (output, cut) for prompt, output, cut in rows})
        if self.path is not None:
            lines = [
                {"key": prompt_key(prompt), "prompt": prompt, "output": output, "is_cut_off": cut}
                for prompt, output, cut in rows
            ]
            _append(self.path, [line | {_HASH: _hash(self.header, line)} for line in lines])


def why_not_kept(folder: Path) -> str | None:
    """Make ``folder`` and return why files cannot be kept in it; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return (error.strerror or str(error)).lower()


def outputs_path(stem: Path, settings: Any, frame: str = "") -> Path:
    """Return ``stem`` with how outputs are decoded in its name: beams, tokens, and the tag of where answers end."""
    beams = f"-beams{settings.num_beams}" if settings.num_beams > 1 else ""
    return stem.with_name(f"{stem.name}{beams}-tokens{settings.max_new_tokens}{frame and f'-frame{frame}'}.jsonl")


def prompt_key(prompt: str) -> str:
    """Return the short hash a prompt goes by."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _read(path: Path, whole: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, bool]]]:
    """Return the first line of a file of outputs, and what is decoded."""
    try:
        lines = rows_of_lines(path, whole.decode("utf-8"))
        _, header = next(lines)
        number = header[_FORMAT]
    except (ValueError, KeyError, StopIteration) as error:
        raise EvaluationError(
            f"{path}: expected decoded outputs, got another file ({error}): choose another file"
        ) from error
    DECODED_OUTPUTS.check(path, number, EvaluationError)
    try:
        rows = list(lines)
    except ValueError as error:
        raise EvaluationError(f"{path} is no file of decoded outputs ({error}): choose another file") from error
    for number, row in rows:
        if row.pop(_HASH, None) != _hash(header, row):
            raise EvaluationError(
                f"{path} line {number}: expected an output as it was written, got another (its sha256 does not fit): "
                f"{DECODED_OUTPUTS.remedy}"
            )
    return header, {row["prompt"]: (row["output"], row["is_cut_off"]) for _, row in rows}


def _hash(header: dict[str, Any], row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([header, row], sort_keys=True).encode()).hexdigest()


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True) + "\n"
