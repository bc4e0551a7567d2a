"""A site's ledger of privacy: what all studies have cost its rows, and what one may still cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedloom.assembly.private_rounds import booking_of, num_units_of
from fedloom.assembly.round_plan import SYSTEM
from fedloom.data.tokens import TokenSet
from fedloom.errors import PrivacyError
from fedloom.privacy.accountant import check_accountant
from fedloom.privacy.ledger import LEDGER, Budget, Ledger
from fedloom.sites import policy
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_settings import SiteSettings

_ITSELF = 0
"""The site in its own ledger: it may be another client in every study."""


@dataclass(frozen=True, eq=False)
class SiteBooks:
    """The ledger, and what a round of one study costs."""

    ledger: Ledger
    sheet: Sheet
    num_units: int

    @classmethod
    def of(cls, site: SiteSettings, sheet: Sheet, rows: TokenSet) -> SiteBooks | None:
        """Return the books for a study that hides rows; None for another.

        Raises:
            MissingExtraError: the accountant is not installed.
            RunError: the ledger cannot be read.
        """
        if sheet.training.privacy is None:
            return None
        check_accountant()
        deltas, limits = [site.policy.delta], [site.policy.max_epsilon]
        if sheet.budget is not None:
            deltas, limits = [*deltas, sheet.budget.delta], [*limits, sheet.budget.max_epsilon]
        budget = Budget(min(deltas), min((limit for limit in limits if limit is not None), default=None))
        return cls(Ledger(site.folder / LEDGER, budget), sheet, num_units_of(rows))

    def book(self, round: int) -> Refusal | None:
        """Book a round before its first step, or return why it may not be taken.

        Raises:
            RunError: the disk refused.
        """
        training = self.sheet.local_training
        if self.sheet.sends_gradients:
            training = replace(training, steps=1, epochs=None)
        one = booking_of(training, self.num_units, _ITSELF, round, run=self.sheet.run, draws=SYSTEM)
        try:
            self.ledger.book(one)
        except PrivacyError:
            return Refusal(code=policy.BUDGET)
        return None

    @property
    def of_study(self) -> float:
        """What the study has cost so far."""
        return self.ledger.epsilon(_ITSELF, self.sheet.run)
