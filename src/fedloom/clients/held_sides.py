"""The sides that the clients of one machine hold: each version built once, by applying news to an older one."""

from __future__ import annotations

from collections.abc import Callable

from fedloom.errors import BehindError
from fedloom.lora.pair import Adapter
from fedloom.methods.side import digest, grown_by
from fedloom.methods.state import News

VERSIONS_KEPT = 8
"""Versions of the side kept at once, so that memory does not grow with the rounds."""


class HeldSides:
    """Sides by version. Clients that hold the same version share one copy."""

    def __init__(self, version: int = 0, side: Adapter | None = None) -> None:
        """Start with the side of one version; by default the empty one of version 0."""
        self._sides: dict[int, Adapter] = {version: side or Adapter()}
        self._digests: dict[int, str] = {version: digest(self._sides[version])}

    def caught_up(self, held: int, news: News) -> Adapter:
        """Return the side that a client which holds version ``held`` has after its news, and keep it.

        A client that is ahead of what the server believes skips the parts it has. A version that is no longer kept is
        replaced by the oldest kept one, which its client would have caught up to on the way.

        Raises:
            BehindError: if the news do not start at, or lead to, what the client holds; it says which version it holds.
        """
        if news.sha256 == self._digests.get(news.version):
            return self._sides[news.version]
        if news.is_whole:
            side = news.parts[0]
        else:
            version = held if held in self._sides else min((v for v in self._sides if v >= held), default=-1)
            if version < news.since or version > news.version:
                raise BehindError(
                    held, f"it holds version {max(version, 0)} of the side, the news start at version {news.since}"
                )
            side = grown_by(self._sides[version], news.parts[version - news.since :])
        if (found := digest(side)) != news.sha256:
            raise BehindError(0, f"its side has hash {found[:12]} after the news, the server's {news.sha256[:12]}")
        self._keep(news.version, side, found)
        return side

    def at(self, version: int) -> Adapter:
        """Return the side of a version that is held."""
        return self._sides[version]

    def hold(self, version: int, side: Callable[[], Adapter]) -> None:
        """Hold a version of the side as it was handed over, ``side`` being asked only where it is not held yet."""
        if version not in self._sides:
            found = side()
            self._keep(version, found, digest(found))

    def _keep(self, version: int, side: Adapter, sha256: str) -> None:
        self._sides[version], self._digests[version] = side, sha256
        for oldest in sorted(self._sides)[:-VERSIONS_KEPT]:
            del self._sides[oldest], self._digests[oldest]
