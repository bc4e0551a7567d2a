"""Shipped experiments: a TOML file each, with what it claims in its header.

A header is comment lines ``# key: text`` with the keys of :data:`KEYS`, continued on lines indented further. The
``small`` run keeps method, ranks, clients and rounds; rate and batches are such that the small base learns from few
rows. ``prints`` is a line that it prints at its end.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from fedloom.errors import SettingsError
from fedloom.wording import nearest

KEYS = ("claim", "command", "machine", "expect", "small", "prints")
_ENTRY = re.compile(r"# (\w+): (.*)")


@dataclass(frozen=True)
class Recipe:
    """A shipped experiment: what it claims, how to run it, on what, the number to expect, and a run on a small base.

    ``prints`` is what the small run ends with.
    """

    name: str
    claim: str
    command: str
    machine: str
    expect: str
    small: str
    prints: str

    def as_dict(self) -> dict[str, str]:
        """Return the header as plain values."""
        return asdict(self)


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".toml")
    )


def read(name: str) -> str:
    """Return the text of the shipped recipe ``name``.

    Raises:
        SettingsError: there is none of that name.
    """
    if name not in names():
        close = nearest(name, names())
        action = f"did you mean {close}?" if close else "name one of them, or a file ending in .toml"
        raise SettingsError(
            f"{name}: expected a shipped recipe ({', '.join(names())}) or a file, got neither; {action}"
        )
    return (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")


def describe(name: str) -> Recipe:
    """Read the header of the shipped recipe ``name``.

    Raises:
        SettingsError: there is none of that name, or its header lacks a key.
    """
    entries: dict[str, str] = {}
    key = ""
    for line in read(name).splitlines():
        if match := _ENTRY.fullmatch(line):
            key = match[1]
            entries[key] = match[2]
        elif key and line.startswith("#   "):
            entries[key] += " " + line.removeprefix("#").strip()
        else:
            key = ""
    missing = [key for key in KEYS if key not in entries]
    if missing:
        raise SettingsError(
            f"{name}.toml: expected a header with {', '.join(KEYS)}, got one without {', '.join(missing)}; add what is "
            "missing"
        )
    return Recipe(name, **{key: entries[key] for key in KEYS})


def copy(name: str, to: Path) -> Path:
    """Write the shipped recipe ``name`` to a new file ``to`` (in a folder: under its own name) and return the file.

    Raises:
        SettingsError: there is no such recipe, or the file exists or cannot be written.
    """
    text = read(name)
    file = to / f"{name}.toml" if to.is_dir() else to
    unfinished = file.with_name(f".{file.name}.copying")
    try:
        unfinished.write_text(text, encoding="utf-8")
        file.hardlink_to(unfinished)  # it appears whole or not at all, and never in the place of another
    except FileExistsError as error:
        raise SettingsError(f"{file}: expected a new file, got one that exists; choose another name") from error
    except OSError as error:
        raise SettingsError(f"{file}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return file
