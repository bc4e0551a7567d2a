"""The same experiment with another method or seed, for comparisons at equal budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedloom.config.checks import inapplicable
from fedloom.config.round_checks import draws_apart, turning
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
    their defaults, and so do a weighting, an initialisation, a robust rule, moments, few bits and hidden clients that
    the method does not know. Settings named in ``keep`` stay as they are, whether they fit or not.
    """
    changed = _with_own_defaults(_replaced(settings, "method.name", method), settings.traits.defaults, keep)
    if _knows_one_rank(changed):
        changed = _with_one_rank(changed, keep)
    if changed.method.weighting not in changed.traits.weightings and "method.weighting" not in keep:
        changed = _without(changed, "method.weighting")
    known = changed.traits.initialisations
    if known and changed.method.initialisation not in known and "method.initialisation" not in keep:
        changed = _without(changed, "method.initialisation")
    if changed.server.robust == "cosine" and draws_apart(changed) and "server.robust" not in keep:
        changed = _without(changed, "server.robust")
    if changed.privacy.unit == "client" and not changed.traits.freezes_a and "privacy.unit" not in keep:
        changed = _without(changed, "privacy.unit")
    if changed.privacy.sum not in ("plain", changed.traits.secure_sum) and "privacy.sum" not in keep:
        changed = _without(changed, "privacy.sum")
    if changed.federation.sampling == "poisson" and changed.privacy.unit != "client":
        changed = changed if "federation.sampling" in keep else _without(changed, "federation.sampling")
    for problem in turning(changed):
        if problem.setting not in keep:
            changed = _without(changed, problem.setting)
    while names := [name for name, *_ in inapplicable(changed) if name not in keep]:
        for name in names:
            changed = _without(changed, name)
    return changed


def _with_own_defaults(settings: Settings, former: Mapping[str, Any], keep: Collection[str]) -> Settings:
    """Give settings at the former method's defaults those of the present one."""
    own = settings.traits.defaults
    for name in {**former, **own}:
        usual = _default_of(settings, name)
        # Of two methods with defaults of their own neither's are what the other was given: so what is usual counts too.
        unnamed = (former.get(name, usual),) if former == own else (former.get(name, usual), usual)
        if name not in keep and settings.value(name) in unnamed:
            settings = _replaced(settings, name, own.get(name, usual))
    return _stepping_as_trained(settings, keep)


def filled_in(settings: Settings, given: Collection[str]) -> Settings:
    """Return settings of which those not ``given`` have their method's own default."""
    for name, value in settings.traits.defaults.items():
        if name not in given:
            settings = _replaced(settings, name, value)
    return _stepping_as_trained(settings, given)


def _stepping_as_trained(settings: Settings, given: Collection[str]) -> Settings:
    """Leave a server step on gradients that is a method's default to runs of one local step."""
    by_default = "server.step" not in given and settings.traits.defaults.get("server.step") == settings.server.step
    if by_default and settings.training.local_steps != 1:
        return _without(settings, "server.step")
    return settings


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
    changes |= {"evaluation.suites": (), "evaluation.paths": {}, "evaluation.every": 0, "evaluation.clients": 0.0}
    for name, value in changes.items():
        settings = _replaced(settings, name, value)
    tracking = ("run.trackers", "run.project", "run.group", "run.tags")
    for name in ("run.keep_updates", "run.keep_states", "evaluation.patience", *tracking):
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
    return _replaced(settings, name, _default_of(settings, name))


def _default_of(settings: Settings, name: str) -> Any:
    table, _, key = name.partition(".")
    return type(getattr(settings, table)).model_fields[key].get_default()
