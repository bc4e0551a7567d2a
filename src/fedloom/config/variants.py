"""The same experiment with another method or seed, for comparisons at equal budget."""

from __future__ import annotations

from typing import Any

from fedloom.config.algorithm import MethodName
from fedloom.config.checks import inapplicable
from fedloom.config.schema import Settings

ONE_RANK = ("fedit", "centralised")


def with_seed(settings: Settings, seed: int) -> Settings:
    """Return the experiment under another seed."""
    return _replaced(settings, "run.seed", seed)


def with_method(settings: Settings, method: MethodName) -> Settings:
    """Return the experiment with another method; everything else stays, except what that method cannot use.

    Methods that know one rank (FedIT, centralised) get the mean of the list, so that a client trains and sends as much
    on average as with the list; alphas likewise. Settings that act only with the former method go back to their
    defaults, and weights by norm to weights by rows.
    """
    changed = _replaced(settings, "method.name", method)
    if method in ONE_RANK:
        changed = _with_one_rank(changed)
    if changed.method.weighting == "norm" and method != "zero-padding":
        changed = _replaced(changed, "method.weighting", "rows")
    while names := [name for name, *_ in inapplicable(changed)]:
        for name in names:
            changed = _without(changed, name)
    return changed


def _with_one_rank(settings: Settings) -> Settings:
    ranks, alpha = settings.method.ranks, settings.method.alpha
    if isinstance(ranks, tuple):
        settings = _replaced(settings, "method.ranks", max(1, round(sum(ranks) / len(ranks))))
    if isinstance(alpha, tuple):
        settings = _replaced(settings, "method.alpha", sum(alpha) / len(alpha))
    return settings


def _replaced(settings: Settings, name: str, value: Any) -> Settings:
    table, _, key = name.partition(".")
    part = getattr(settings, table)
    return settings.model_copy(update={table: part.model_copy(update={key: value})})


def _without(settings: Settings, name: str) -> Settings:
    table, _, key = name.partition(".")
    return _replaced(settings, name, type(getattr(settings, table)).model_fields[key].get_default())
