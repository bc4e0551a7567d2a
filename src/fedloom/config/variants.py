"""The same experiment with another method or seed, for comparisons at equal budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fedloom.config.checks import draws_apart, inapplicable
from fedloom.config.schema import Settings
from fedloom.config.setting import values_of
from fedloom.methods import table


def with_seed(settings: Settings, seed: int) -> Settings:
    """Return the experiment under another seed."""
    return _replaced(settings, "run.seed", seed)


def with_method(settings: Settings, method: str, *, keep: Collection[str] = ()) -> Settings:
    """Return the experiment with another method; everything else stays, except what that method cannot use.

    Methods that need one rank, alone or for the halves of a cut, get the mean of the list, so that a client trains and
    sends as much on average as with the list; alphas likewise. Settings that act only with the former method go back to
    their defaults, and so do a weighting and a robust rule that the method does not know. Settings named in ``keep``
    stay as they are, whether they fit or not.
    """
    changed = _replaced(settings, "method.name", method)
    if _knows_one_rank(changed):
        changed = _with_one_rank(changed, keep)
    if changed.method.weighting not in changed.traits.weightings and "method.weighting" not in keep:
        changed = _without(changed, "method.weighting")
    if changed.server.robust == "cosine" and draws_apart(changed) and "server.robust" not in keep:
        changed = _without(changed, "server.robust")
    while names := [name for name, *_ in inapplicable(changed) if name not in keep]:
        for name in names:
            changed = _without(changed, name)
    return changed


def for_tuning(settings: Settings, seed: int, fraction: float, scored_seeds: Sequence[int]) -> Settings:
    """Return the experiment as it is tuned: under ``seed``, its loss measured at the end, on validation rows alone.

    No row is used on which a run of ``scored_seeds`` is scored; where held-out rows have a file of their own, none can
    be. Nothing is scored besides, no update or state is kept, and nothing is tracked.
    """
    data = settings.data
    draws = data.eval_rows is not None or data.eval_fraction is not None
    changes = {
        "run.seed": seed,
        "data.validation_fraction": fraction,
        "data.scored_seeds": tuple(sorted(scored_seeds)) if draws else (),
    }
    changes |= {"evaluation.suites": (), "evaluation.paths": {}, "evaluation.every": 0}
    for name, value in changes.items():
        settings = _replaced(settings, name, value)
    for name in ("run.keep_updates", "run.keep_states", "run.trackers"):
        settings = _without(settings, name)
    return settings


def _knows_one_rank(settings: Settings) -> bool:
    traits, split = settings.traits, settings.split
    aggregation_does = table.traits_of(split.aggregation).needs_one_rank and split.client_rank is None
    return traits.needs_one_rank or (traits.is_cut and aggregation_does)


def _with_one_rank(settings: Settings, keep: Collection[str]) -> Settings:
    ranks, alpha = settings.method.ranks, settings.method.alpha
    if isinstance(ranks, tuple | dict) and "method.ranks" not in keep:
        settings = _replaced(settings, "method.ranks", max(1, round(_mean(ranks))))
    if isinstance(alpha, tuple | dict) and "method.alpha" not in keep:
        settings = _replaced(settings, "method.alpha", _mean(alpha))
    return settings


def _mean(value: Any) -> float:
    values = values_of(value)
    return float(sum(values) / len(values))


def _replaced(settings: Settings, name: str, value: Any) -> Settings:
    table, _, key = name.partition(".")
    part = getattr(settings, table)
    return settings.model_copy(update={table: part.model_copy(update={key: value})})


def _without(settings: Settings, name: str) -> Settings:
    table, _, key = name.partition(".")
    return _replaced(settings, name, type(getattr(settings, table)).model_fields[key].get_default())
