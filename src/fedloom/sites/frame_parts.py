"""What heads of frames are made of: types, and the parts that several kinds have."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel, ConfigDict, StringConstraints

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Code = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]{0,31}$")]
SiteName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Version = Annotated[str, StringConstraints(pattern=r"^[\w.+-]{1,40}$")]
Count = Annotated[int, Ge(0), Le(1 << 53)]
Round = Annotated[int, Ge(1), Le(1 << 53)]


class Part(BaseModel):
    """A part of a head: frozen, strict about types, closed to unknown entries, its numbers finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Members(Part):
    """Who takes part in a study, by one of its versions; the coordinator signs every version after the first.

    A site's position in ``names`` is its client number; ``settings_sha256`` is of what no version changes.
    """

    version: Annotated[int, Ge(1), Le(1 << 31)]
    names: Annotated[tuple[SiteName, ...], MaxLen(4096)]
    withdrawn: Annotated[tuple[SiteName, ...], MaxLen(4096)] = ()
    settings_sha256: Hash
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]*$", max_length=2048)] = ""

    @property
    def present(self) -> tuple[str, ...]:
        """The sites that have not withdrawn."""
        return tuple(name for name in self.names if name not in self.withdrawn)


class Refusal(Part):
    """Why a site does not do what it is asked: a code, numbers, and hashes. Words stay at the site."""

    code: Code
    numbers: Annotated[dict[Code, int | float], MaxLen(8)] = {}
    hashes: Annotated[dict[Code, Hash], MaxLen(4)] = {}
