"""What the rest of the code may know of a method without running it: its traits. Imports no torch.

Code asks for a trait and never for a name: ``traits.starts_fresh``, not ``name == "flora"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from fedloom.errors import MethodError

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
GRADIENT = "gradient"
"""The value of ``method.initialisation`` with which the first A comes from the clients' gradients."""
WEIGHTINGS = ("rows", "tokens", "uniform", "norm", "work")
DEFAULT_WEIGHTING = "work"
"""With as many steps for every client, weights by rows let the largest speak for all; with epochs both are the same."""


class Kind(StrEnum):
    """What a method is, in the order in which tables show methods."""

    FEDERATED = "federated"
    """Clients train adapters, the server aggregates them, round after round."""
    SPLIT = "split"
    """The model is cut: clients train its lower blocks, the server the rest."""
    CONTROL = "control"
    """Ordinary tuning at the same budget: nothing crosses, the optimiser persists, the schedule spans the run."""
    UNTRAINED = "untrained"
    """The base as it is."""


class Law(StrEnum):
    """The laws of aggregation, in the order of tables; `fedloom.audit` measures them, docs/audit.md explains them."""

    EXACTNESS = "exactness"
    RESCALING = "rescaling"
    ORIENTATION = "orientation"
    PERMUTATION = "permutation"
    NO_OP = "no-op"
    NO_OP_RANKS = "no-op-ranks"
    ONE_CLIENT = "one-client"
    EQUAL_CLIENTS = "equal-clients"
    PARTIAL = "partial"
    PROPORTIONS = "proportions"
    NORMALISATION = "normalisation"
    SPLITTING = "splitting"
    STREAMING = "streaming"
    CATCH_UP = "catch-up"
    INPUTS = "inputs"


@dataclass(frozen=True)
class Traits:
    """A method's traits. Those left at their defaults describe a federated method of any ranks, as zero-padding is.

    Attributes:
        name: as in ``method.name``: small letters, digits, hyphens.
        title: one line that says what it does, for tables, help and documentation.
        kind: what it is.
        weightings: the values of ``method.weighting`` it knows.
        needs_one_rank: its aggregate is defined for equal ranks only.
        starts_fresh: every round a client trains a fresh adapter, drawn as ``method.initialisation`` says.
        grows_side: its aggregate, or a part of it, joins the side adapter, in the form of ``method.broadcast``.
        averages_factors: its next start is the mean of the clients' factors, so that a server may step along the mean
            of their gradients instead (``server.step = adamw``).
        turns_slots: every round the server gives the slots other directions, so that nothing that is kept or counted
            slot by slot goes on: moments, differences of few bits.
        stacks_products: its aggregate is the weighted sum of the clients' products, all of which joins the side, so
            that a sum of sketches will do (``privacy.sum = sketch``).
        freezes_a: its clients train B alone, over one A that all share and nobody changes, and its aggregate is the
            mean of the B's: noise on the sum of their changes is of known size (``privacy.unit = client``).
        aggregates_split: it may aggregate the clients' half of a cut model (``split.aggregation``).
        combines: it works on adapters at hand, without rounds (``fedloom.aggregate``).
        is_personal: clients keep a factor of their own, so the result is one adapter per client and the server knows no
            product: no server step, no robust rule.
        pools_rows: one client owns all rows.
        is_standard: ``fedloom demo`` runs it, and so does ``fedloom compare`` without ``--methods``.
        defaults: the settings that have another default with this method, e.g. ``{"wire.dtype": "int4"}``.
        unclaimed: the laws of aggregation (:class:`Law`) that it does not promise; it promises all others.

    Raises:
        MethodError: they contradict each other.
    """

    name: str
    title: str
    kind: Kind = Kind.FEDERATED
    weightings: tuple[str, ...] = ("rows", "tokens", "uniform", "work")
    needs_one_rank: bool = False
    starts_fresh: bool = False
    grows_side: bool = False
    averages_factors: bool = False
    turns_slots: bool = False
    stacks_products: bool = False
    freezes_a: bool = False
    aggregates_split: bool = True
    combines: bool = True
    is_personal: bool = False
    pools_rows: bool = False
    is_standard: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unclaimed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise MethodError(
                f"method {self.name!r}: expected a name of small letters, digits and hyphens; rename it, e.g. my-method"
            )
        if not self.title.strip():
            raise MethodError(f"method {self.name}: expected a title that says what it does, got none; add one line")
        if unknown := [one for one in self.weightings if one not in WEIGHTINGS]:
            known = ", ".join(WEIGHTINGS)
            raise MethodError(f"method {self.name}: expected weightings of {known}, got {unknown[0]!r}; remove it")
        if unknown := [one for one in self.unclaimed if one not in list(Law)]:
            raise MethodError(
                f"method {self.name}: expected unclaimed laws of {', '.join(Law)}, got {unknown[0]!r}; correct it"
            )
        chosen = self.defaults.get("method.weighting", DEFAULT_WEIGHTING)
        if self.aggregates and chosen not in self.weightings:
            raise MethodError(
                f"method {self.name}: expected weightings with {chosen}, the default of method.weighting, got "
                f"{self.weightings}; add it, or name another in defaults"
            )
        for trait in (
            "starts_fresh",
            "grows_side",
            "averages_factors",
            "turns_slots",
            "freezes_a",
            "aggregates_split",
            "combines",
        ):
            if getattr(self, trait) and not self.aggregates:
                raise MethodError(
                    f"method {self.name}: expected {trait} with kind = federated only, got {self.kind}; "
                    f"set {trait}=False"
                )
        for trait in ("starts_fresh", "grows_side", "aggregates_split", "combines"):
            if self.is_personal and getattr(self, trait):
                raise MethodError(
                    f"method {self.name}: expected {trait}=False with is_personal, got True; set {trait}=False"
                )
        if self.turns_slots and (self.starts_fresh or self.averages_factors):
            raise MethodError(
                f"method {self.name}: expected turns_slots with neither starts_fresh nor averages_factors, got one; "
                "set it to False"
            )
        if self.stacks_products and not (self.starts_fresh and self.grows_side):
            raise MethodError(
                f"method {self.name}: expected stacks_products with starts_fresh and grows_side, got one of them "
                "False; set it to True"
            )
        if self.freezes_a and (self.starts_fresh or self.grows_side or self.is_personal):
            raise MethodError(
                f"method {self.name}: expected freezes_a with none of starts_fresh, grows_side and is_personal, got "
                "one; set it to False"
            )
        if self.is_personal and not self.aggregates:
            raise MethodError(
                f"method {self.name}: expected is_personal with kind = federated only, got {self.kind}; remove it"
            )
        if self.pools_rows and not self.is_control:
            raise MethodError(
                f"method {self.name}: expected pools_rows with kind = control only, got {self.kind}; remove it"
            )

    @property
    def aggregates(self) -> bool:
        """Whether a server aggregates adapters."""
        return self.kind is Kind.FEDERATED

    @property
    def takes_server_steps(self) -> bool:
        """Whether the server forms a product, along which it may take a step of its own."""
        return self.aggregates and not self.is_personal

    @property
    def continues(self) -> bool:
        """Whether clients go on in the next round from what the server made of the last one's factors."""
        return self.aggregates and not self.starts_fresh

    @property
    def sums_factors(self) -> bool:
        """Whether one weighted sum of the clients' factors is all that its aggregate needs."""
        return self.averages_factors and not self.grows_side

    @property
    def secure_sum(self) -> Literal["masked", "sketch"] | None:
        """Which ``privacy.sum`` its aggregate can be made of: a sum of factors, or of sketches; None: of neither."""
        if self.sums_factors:
            return "masked"
        return "sketch" if self.stacks_products else None

    @property
    def sums(self) -> bool:
        """Whether one weighted sum over the clients is all that its aggregate needs: of factors, or of sketches."""
        return self.secure_sum is not None

    @property
    def takes_start(self) -> bool:
        """Whether training can begin with the factors of an adapter at hand."""
        return self.continues or self.is_control

    @property
    def initialisations(self) -> tuple[str, ...]:
        """The values of ``method.initialisation`` that act, the default first."""
        if not self.aggregates:
            return ()
        return ("independent", "shared") if self.starts_fresh else ("independent", GRADIENT)

    @property
    def is_cut(self) -> bool:
        """Whether the model is cut in two, so that activations cross."""
        return self.kind is Kind.SPLIT

    @property
    def is_uncut(self) -> bool:
        """Whether whoever computes has the whole model."""
        return not self.is_cut

    @property
    def is_control(self) -> bool:
        """Whether nothing crosses, the optimiser persists and the schedule spans the run."""
        return self.kind is Kind.CONTROL

    @property
    def is_trained(self) -> bool:
        """Whether anything is trained at all."""
        return self.kind is not Kind.UNTRAINED

    @property
    def runs_rounds(self) -> bool:
        """Whether it runs in the loop of rounds, alone or with others."""
        return self.kind in (Kind.FEDERATED, Kind.CONTROL)

    @property
    def sends_adapters(self) -> bool:
        """Whether adapters cross between clients and server."""
        return self.kind in (Kind.FEDERATED, Kind.SPLIT)

    @property
    def sends_products(self) -> bool:
        """Whether whole adapters cross, so that the server can compare the clients' products."""
        return self.sends_adapters and not self.is_personal

    @property
    def has_clients(self) -> bool:
        """Whether several clients train."""
        return self.is_trained and not self.pools_rows
