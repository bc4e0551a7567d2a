"""The formats of the files that outlive a process: one number each, and one way to reject a file of another.

A number goes up when what is written changes so that earlier versions would misread it. The oldest number that is
still read goes up only where a reader for it was dropped; the last version that has one is then named here.
Adapters are in PEFT's format and have no number of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.errors import FedloomError


@dataclass(frozen=True)
class FileFormat:
    """What a kind of file is called, the number that is written, and what to do with a file of another number.

    Attributes:
        oldest: the earliest number that is read.
        last_read_by: by number that is no longer read, the last version of fedloom that reads it.
    """

    name: str
    number: int
    remedy: str
    oldest: int = 1
    last_read_by: Mapping[int, str] = field(default_factory=dict)

    def check(self, path: Path | str, found: object, error: type[FedloomError], written_by: str | None = None) -> None:
        """Check that a file of the number ``found`` can be read; ``written_by`` is the version of fedloom it names.

        Raises:
            FedloomError: it cannot, as an ``error``.
        """
        is_number = isinstance(found, int) and not isinstance(found, bool)
        if is_number and self.oldest <= found <= self.number:  # type: ignore[operator]
            return
        numbers = f"format {self.number}" if self.oldest == self.number else f"formats {self.oldest} to {self.number}"
        if is_number and found > self.number:  # type: ignore[operator]
            newer = f" to {written_by}, which wrote it" if written_by else ""
            action = f"upgrade fedloom{newer}, or {self.remedy}"
        elif is_number and found in self.last_read_by:
            action = f"use fedloom {self.last_read_by[found]}, the last to read it, or {self.remedy}"  # type: ignore[index]
        else:
            action = self.remedy
        raise error(
            f"{path}: expected a {self.name} of {numbers}, which this version of fedloom reads, got format {found!r}: "
            f"{action}; nothing was changed"
        )


RUN_FOLDER = FileFormat("run folder", 3, "choose another folder", oldest=3)
"""1, 2: without hashes of the files; not read, but for the adapter in it as a PEFT folder. 3: with them."""
COMPARISON = FileFormat("comparison", 1, "choose another --out")
TUNING = FileFormat("file of tuned settings", 1, "choose another --out")
PARTITION = FileFormat("partition", 1, "make a new partition")
DECODED_OUTPUTS = FileFormat("file of decoded outputs", 3, "remove it to decode anew", oldest=3)
"""1: from prompts tokenised otherwise than in training; 2: lines without a hash; neither is read. 3: with it."""
SOURCES = FileFormat("record of an aggregate's sources", 1, "aggregate again")
VERDICT_CACHE = FileFormat("cache of verdicts", 2, "choose another file")
"""1: without a hash over each verdict; read, and given one. 2: with it."""
TOKEN_CACHE = FileFormat("cache of tokens", 1, "remove it")
