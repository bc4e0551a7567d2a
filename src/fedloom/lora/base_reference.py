"""How an adapter's files name their base: by what others can use, never by its place on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloom import embedded
from fedloom.names import looks_like_hub_name

_SHA256, _KIND, _FOLDER = "base_sha256", "base_kind", "folder"


@dataclass(frozen=True)
class BaseReference:
    """A base's name on the hub or that of its folder, and the sha256 of its configuration and weights if known."""

    name: str
    is_folder: bool = False
    sha256: str | None = None

    @classmethod
    def of(cls, name_or_path: str, sha256: str | None = None) -> BaseReference:
        """Return the reference to a base that lies here or on the hub; a folder goes by its own name alone."""
        path = Path(name_or_path).expanduser()
        if not name_or_path:
            return cls("", is_folder=True, sha256=sha256)
        if embedded.base_path(name_or_path) == embedded.model_path() or path == embedded.model_path():
            return cls(embedded.NAME, sha256=sha256)
        # The hub's own cache: …/models--org--name/snapshots/<revision>.
        cached = next((part for part in path.parts if part.startswith("models--")), None)
        if cached is not None and "snapshots" in path.parts:
            return cls(cached.removeprefix("models--").replace("--", "/"), sha256=sha256)
        if path.exists() or not looks_like_hub_name(name_or_path):
            return cls(path.name or path.resolve().name, is_folder=True, sha256=sha256)
        return cls(name_or_path, sha256=sha256)

    @classmethod
    def recorded(cls, name: str, metadata: Mapping[str, str]) -> BaseReference:
        """Return the reference in an adapter's files: the name in its settings, the rest beside its weights."""
        if metadata.get(_KIND) == _FOLDER:
            return cls(Path(name).name, is_folder=True, sha256=metadata.get(_SHA256))
        return cls.of(name, metadata.get(_SHA256))

    @property
    def metadata(self) -> dict[str, str]:
        """What stands beside the weights: peft reads no other key in its settings without a warning."""
        hashed = {} if self.sha256 is None else {_SHA256: self.sha256}
        return hashed | ({_KIND: _FOLDER} if self.is_folder else {})

    @property
    def is_public(self) -> bool:
        """Whether the name is one on the hub."""
        return not self.is_folder and self.name != embedded.NAME
