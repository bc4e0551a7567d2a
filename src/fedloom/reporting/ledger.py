"""What a round costs: bytes as serialised, seconds by phase, peak memory, parameters trained."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Direction = Literal["upload", "download"]
_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True)
class RoundCost:
    """The closed books of one round.

    ``bytes_by_client[k]`` and ``bytes_by_kind[kind]`` are (upload, download); both sum to the totals. Seconds of nested
    phases count once, for the inner one, so that ``sum(seconds.values())`` is time on the clock. ``peak_memory_bytes``
    is the process's high-water mark so far; ``peak_device_bytes`` the accelerator's in this round, None without one.
    """

    upload_bytes: int
    download_bytes: int
    bytes_by_client: dict[int, tuple[int, int]]
    bytes_by_kind: dict[str, tuple[int, int]]
    seconds: dict[str, float]
    num_trained_parameters: int
    peak_memory_bytes: int
    peak_device_bytes: int | None

    def to_record(self) -> dict[str, Any]:
        """Return the fields of a round's line in metrics.jsonl; a client's own bytes belong to the client's entry."""
        return {
            "upload_bytes": self.upload_bytes,
            "download_bytes": self.download_bytes,
            "bytes_by_kind": {
                kind: {"upload_bytes": up, "download_bytes": down} for kind, (up, down) in self.bytes_by_kind.items()
            },
            "seconds": self.seconds,
            "num_trained_parameters": self.num_trained_parameters,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_device_bytes": self.peak_device_bytes,
        }


class Ledger:
    """Collects costs while a round runs; :meth:`close_round` returns them and starts over.

    Feed it the length of what was serialised (``len(message)``), never an estimate::

        ledger.upload(client, len(data))
        with ledger.phase("aggregate"):
            ...
        cost = ledger.close_round()
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phases: list[str] = []
        self._since = 0.0
        self._open_round()

    def upload(self, client: int, num_bytes: int, kind: str = "adapter") -> None:
        """Count ``num_bytes`` sent by ``client`` to the server; ``kind`` is any name, e.g. "activations"."""
        self._bytes["upload"][client, kind] += num_bytes

    def download(self, client: int, num_bytes: int, kind: str = "adapter") -> None:
        """Count ``num_bytes`` sent by the server to ``client``."""
        self._bytes["download"][client, kind] += num_bytes

    def client_bytes(self, client: int, direction: Direction) -> int:
        """Return what one client sent or received so far in this round."""
        return sum(count for (owner, _), count in self._bytes[direction].items() if owner == client)

    def trained(self, num_parameters: int) -> None:
        """Count parameters that one client trained."""
        self._num_trained_parameters += num_parameters

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside the block to ``name``; an outer phase rests meanwhile."""
        self._book()
        self._phases.append(name)
        try:
            yield
        finally:
            self._book()
            self._phases.pop()

    def close_round(self) -> RoundCost:
        """Return the round's costs and open the next round."""
        self._book()
        cost = RoundCost(
            upload_bytes=self._bytes["upload"].total(),
            download_bytes=self._bytes["download"].total(),
            bytes_by_client=self._pairs(lambda key: key[0]),
            bytes_by_kind=self._pairs(lambda key: key[1]),
            seconds=dict(self._seconds),
            num_trained_parameters=self._num_trained_parameters,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_bytes=_take_peak_device_bytes(),
        )
        self._open_round()
        return cost

    def _open_round(self) -> None:
        self._bytes: dict[Direction, Counter[tuple[int, str]]] = {"upload": Counter(), "download": Counter()}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_trained_parameters = 0

    def _book(self) -> None:
        now = self._clock()
        if self._phases:
            self._seconds[self._phases[-1]] += now - self._since
        self._since = now

    def _pairs(self, field: Callable[[tuple[int, str]], _Key]) -> dict[_Key, tuple[int, int]]:
        up = _regrouped(self._bytes["upload"], field)
        down = _regrouped(self._bytes["download"], field)
        return {key: (up[key], down[key]) for key in sorted(up.keys() | down.keys())}


def _regrouped(counts: Counter[tuple[int, str]], field: Callable[[tuple[int, str]], _Key]) -> Counter[_Key]:
    regrouped: Counter[_Key] = Counter()
    for key, count in counts.items():
        regrouped[field(key)] += count
    return regrouped


@dataclass(frozen=True)
class TotalCost:
    """What a whole run cost."""

    num_rounds: int
    upload_bytes: int
    download_bytes: int
    seconds: float
    peak_memory_bytes: int


def total_cost(records: Iterable[Mapping[str, Any]]) -> TotalCost:
    """Add up the records of a run's rounds, resumed or not."""
    rows = list(records)
    return TotalCost(
        num_rounds=len(rows),
        upload_bytes=sum(row.get("upload_bytes") or 0 for row in rows),
        download_bytes=sum(row.get("download_bytes") or 0 for row in rows),
        seconds=sum(sum((row.get("seconds") or {}).values()) for row in rows),
        peak_memory_bytes=max((row.get("peak_memory_bytes") or 0 for row in rows), default=0),
    )


def was_left_out(client: Mapping[str, Any]) -> bool:
    """Return whether a client's entry in a round's record tells of an update that was not used."""
    return bool(client.get("reason")) or client.get("status", "ok") != "ok"


def peak_memory_bytes() -> int:
    """Return the most memory this process ever held resident."""
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high_water if sys.platform == "darwin" else high_water * 1024


def _take_peak_device_bytes() -> int | None:
    """Return the accelerator's high-water mark since the last call, without loading torch where nobody has."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
