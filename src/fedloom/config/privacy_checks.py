"""What privacy demands of other settings: nothing crosses, or weighs, that was not noised."""

from __future__ import annotations

from collections.abc import Iterator

from fedloom.config.problems import Problem
from fedloom.config.schema import Settings
from fedloom.methods.traits import GRADIENT


def private_rows(settings: Settings) -> Iterator[Problem]:
    """Weights are no counts of what was drawn, and the gradient of four rows has no place under noise."""
    if settings.privacy.unit != "row":
        return
    if settings.method.weighting == "tokens" and settings.traits.aggregates:
        yield Problem(
            "privacy.unit",
            "none with method.weighting = tokens, since the number of tokens in the rows that were drawn is not hidden",
            "row",
            "choose another method.weighting, e.g. rows, which are counted before the first round",
            ("method.weighting",),
        )
    if settings.method.initialisation == GRADIENT:
        yield Problem(
            "privacy.unit",
            "none with method.initialisation = gradient, whose sketch of four rows would be nothing but noise",
            "row",
            "choose another method.initialisation",
            ("method.initialisation",),
        )
