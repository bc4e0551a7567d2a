"""What a site's worker enters into the ledger, and says in its log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.sites import policy
from fedloom.sites.frames import Result
from fedloom.sites.sheet import Sheet
from fedloom.sites.store import Ledger
from fedloom.sites.sum_frames import SumAnswered


class SiteLedger:
    """The ledger of a site, and its log."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._ledger, self._note = Ledger(folder), note

    def add(self, **entry: Any) -> None:
        """Append a line.

        Raises:
            RunError: the disk refused.
        """
        self._ledger.add(**entry)

    def enter(self, **entry: Any) -> bool:
        """Append a line; a disk that refuses it is told in the log, and ends no membership."""
        try:
            self._ledger.add(**entry)
        except RunError as error:
            self._note(str(error))
            return False
        return True

    def introduce(self, sheet: Sheet) -> None:
        """Enter what a run asks for.

        Raises:
            RunError: the disk refused.
        """
        training = sheet.training
        asked = {"rank": sheet.rank, "rounds": training.total_rounds, "steps": training.steps}
        self.add(event="run", run=sheet.run, method=sheet.method, base=sheet.base_sha256, **asked)

    def book(self, head: Result, sent: int) -> bool:
        """Enter an answer; where that cannot be done it must not leave."""
        entry = {"run": head.run, "round": head.round, "seconds": round(head.seconds, 3), "sent_bytes": sent}
        if head.refusal is not None:
            why = policy.in_words(head.refusal)
            self._note(f"round {head.round}: no update: {why}")
            return self.enter(event="task", **entry, code=head.refusal.code, why=why)
        self._note(f"round {head.round}: {'sent again' if head.again else f'trained in {head.seconds:.1f} s'}")
        return self.enter(event="task", **entry, again=head.again)

    def summed(self, head: SumAnswered, sent: int) -> bool:
        """Enter masked numbers that leave, or why the site has left a sum; other steps tell nothing of its rows."""
        entry = {"event": "sum", "run": head.run, "round": head.round}
        if head.refusal is not None:
            why = policy.in_words(head.refusal)
            return self.enter(**entry, code=head.refusal.code, why=why)
        if head.step != "masked":
            return True
        self._note(f"round {head.round}: masked numbers sent")
        return self.enter(**entry, sent_bytes=sent)
