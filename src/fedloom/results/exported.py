"""What an export is: the adapter that is chosen, at which rank and type, what that loses, and how a folder appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.errors import AdapterError, ModelError, RunError
from fedloom.lora.algebra import compress, pad
from fedloom.lora.pair import Adapter
from fedloom.results.chosen_round import RESULT
from fedloom.results.opened_result import Found, find_result, of_client, unfinished_note
from fedloom.run_folder import durable
from fedloom.run_folder.contents import ADAPTER
from fedloom.wording import Displayed

CARD = "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORTH_A_NOTE = 0.01
"""The share lost to rounding above which --dtype float32 is suggested."""
ROUNDING = 1e-6
"""The share below which a difference is float32's rounding."""


@dataclass(frozen=True)
class Exported(Displayed):
    """What was written, and what it lost.

    Attributes:
        form: ``adapter`` or ``merged model``.
        ranks: rank of each module that is adapted.
        norm: Frobenius norm of all that training added.
        rank_error: Frobenius distance of what is written, before the cast, from what training added: 0 without a
            rank, and only rounding (below 1e-6 of the norm) if the rank is large enough for all of it.
        cast_error: Frobenius norm of what rounding to ``dtype`` loses of it.
        unread: which modules stock peft does not load on the base; None where it loads all, or was not asked.
        unchecked: why stock peft was not asked; None where it was.
        needs: what the tool that it is for has to be told.
    """

    folder: Path
    form: str
    dtype: str
    ranks: Mapping[str, int]
    norm: float
    rank_error: float
    cast_error: float
    unread: str | None = None
    unchecked: str | None = None
    needs: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, relative errors included."""
        relative = {f"relative_{name}": self.share(getattr(self, name)) for name in ("rank_error", "cast_error")}
        plain = {"folder": str(self.folder), "ranks": dict(self.ranks), "needs": list(self.needs)}
        return {**self.__dict__, **plain, **relative}

    @property
    def is_exact(self) -> bool:
        """Whether the file holds the whole update, as exactly as float32 can."""
        return self.share(self.rank_error) <= ROUNDING and self.cast_error == 0.0

    def share(self, error: float) -> float:
        """Return an error as a share of all that training added."""
        return error / self.norm if self.norm > 0.0 else 0.0

    def lines(self) -> list[str]:
        """Return what was written and what it lost."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines = [f"{self.folder}: {self.form}, {len(self.ranks)} modules of {ranks}, {self.dtype}", self.rank_line()]
        lines += [self.cast_line()] if self.cast_error > 0.0 else []
        return [*lines, *(line for line in (self.unread, self.unchecked) if line is not None), *self.needs]

    def rank_line(self) -> str:
        """Return what the rank costs."""
        if self.rank_error == 0.0:
            return "lossless in rank: nothing is dropped"
        if (share := self.share(self.rank_error)) <= ROUNDING:
            return f"lossless in rank: nothing is dropped but rounding ({share:.1e} of the update)"
        return f"the rank drops {self.share(self.rank_error):.3%} of the update (‖error‖ {self.rank_error:.4g})"

    def cast_line(self) -> str:
        """Return what rounding costs."""
        share = self.share(self.cast_error)
        advice = "; --dtype float32 keeps it" if share > WORTH_A_NOTE else ""
        return f"rounding to {self.dtype} loses {share:.3%} of it (‖error‖ {self.cast_error:.4g}){advice}"


def chosen_result(source: Path, client: int | None, round: int | str | None = None) -> Found:
    """Return a finished run's result, after a round if one is chosen, or a PEFT folder's; of one client if chosen.

    Raises:
        RunError: the run has not finished, or that client has no adapter.
    """
    found = find_result(source, round)
    if found.run is not None and found.run.finished is None:
        raise RunError(f"{unfinished_note(found.run)}; then export it")
    return of_client(found, client)


def only_adapter(found: Found) -> Adapter:
    """Return the adapter to export, at the rank it truly has.

    Raises:
        AdapterError: there is none.
        RunError: each client has one.
    """
    if not found.adapters:
        raise AdapterError(
            f"{found.path}: expected a result that changes the base, this run adds nothing to it; "
            "choose a run that trains"
        )
    if len(found.adapters) > 1:
        raise RunError(
            f"{found.path}: each of its {len(found.adapters)} clients has its own adapter; choose one with --client K"
        )
    return next(iter(found.adapters.values()))


def at_rank(adapter: Adapter, rank: int | None) -> tuple[Adapter, Mapping[str, float]]:
    """Return the adapter with that rank everywhere, and every module's Frobenius distance from the given one.

    Raises:
        AdapterError: the rank is none from 1 to the largest of the adapter.
    """
    if rank is None:
        return adapter, dict.fromkeys(adapter, 0.0)
    kept = compress(adapter, rank=rank)
    largest = max(kept.adapter.ranks.values())
    if rank > largest:
        raise AdapterError(
            f"--rank: expected 1 to {largest}, the largest rank of the adapter, got {rank}; choose one of these"
        )
    return pad(kept.adapter, rank), kept.errors


def adapter_folder(run: Path, name: str) -> Path:
    """Return the folder of a run's adapter of that name."""
    return run / ADAPTER if name == RESULT else run / ADAPTER / name


def own_folder(found: Found) -> Path:
    """Return the folder of the adapter that is to be exported."""
    return found.path if found.run is None else adapter_folder(found.path, next(iter(found.adapters)))


def is_conv1d(folder: Path) -> bool:
    """Tell whether the adapter's own files say that its base holds transposed weights."""
    return bool(durable.read_json(folder / "adapter_config.json").get("fan_in_fan_out"))


def dtype_named(name: str) -> torch.dtype:
    """Return the type that ``--dtype`` names.

    Raises:
        ModelError: there is none of that name.
    """
    if name not in DTYPES:
        raise ModelError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}; choose one of these")
    return DTYPES[name]


def refuse_files(to: Path) -> None:
    """Reject a place to write that holds anything.

    Raises:
        RunError: it does.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise RunError(f"--to {to}: expected a new or an empty folder, found files; choose another folder")


def publish(to: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder next to ``to`` and rename it: ``to`` exists complete or not at all."""
    refuse_files(to)
    with durable.explained(str(to), "free space or choose another folder"):
        to.parent.mkdir(parents=True, exist_ok=True)
        with durable.temporary_folder(to.parent, to.name) as temporary:
            write(temporary)
            durable.publish(temporary, to)
