"""A site's ledger of privacy: what all studies have cost its rows, and what one may still cost."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.data.tokens import TokenSet
from fedloom.errors import PrivacyError
from fedloom.privacy.accountant import check_accountant
from fedloom.privacy.ledger import LEDGER, Booking, Budget, Ledger
from fedloom.sites import policy
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_settings import SiteSettings
from fedloom.training.private_rows import private_steps_of, sampling_rate

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
        return cls(Ledger(site.folder / LEDGER, budget), sheet, len(rows.by_unit()))

    def book(self, round: int) -> Refusal | None:
        """Book a round before its first step, or return why it may not be taken.

        Raises:
            RunError: the disk refused.
        """
        training = self.sheet.training
        assert training.privacy is not None
        units, size = self.num_units, training.batch_size
        steps = private_steps_of(units, size, 1 if self.sheet.sends_gradients else training.steps, training.epochs)
        one = Booking(
            run=self.sheet.run,
            client=_ITSELF,
            round=round,
            steps=steps,
            rate=sampling_rate(units, size),
            noise_multiplier=training.privacy.noise_multiplier,
            draws="system",
        )
        try:
            self.ledger.book(one)
        except PrivacyError:
            return Refusal(code=policy.BUDGET)
        return None

    @property
    def of_study(self) -> float:
        """What the study has cost so far."""
        return self.ledger.epsilon(_ITSELF, self.sheet.run)
