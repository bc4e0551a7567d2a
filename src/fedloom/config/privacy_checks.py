"""What privacy demands of other settings: nothing crosses, or weighs, that was not noised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.config.problems import Problem
from fedloom.config.schema import Settings, every_setting
from fedloom.config.setting import shown
from fedloom.methods import table
from fedloom.methods.traits import GRADIENT
from fedloom.wording import either


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


_ONLY_WITH: dict[str, tuple[tuple[Any, ...], str]] = {
    "method.weighting": (("uniform",), "since rows, tokens and norms are counts of a client's data"),
    "method.initialisation": (
        ("independent",),
        "since a sketch of gradients is neither clipped nor noised",
    ),
    "server.step": (
        ("plain", "momentum", "fedadam", "fedyogi", "fedadagrad"),
        "since fedexp reads the norm of each client's change, and adamw gradients that nobody clips",
    ),
    "server.robust": (("none",), "since by such a rule one client decides how others count; the clip bounds each"),
    "federation.sampling": (("uniform", "poisson"), "since who is drawn may not depend on a client's rows"),
    "federation.participation": ((None,), "since the number that is expected in a round must be known"),
    "federation.max_norm_ratio": ((100.0,), "since what is far off is clipped, and nobody is held against others"),
    "federation.max_weight": ((1.0,), "since all weigh the same"),
    "federation.min_clients": ((1,), "since a round goes on whoever came: their number would tell of each"),
    "training.moments": (("fresh", "own"), "since the mean of second moments is neither clipped nor noised"),
    "training.control_variates": ((False,), "since the share of clients that came would tell of each"),
    "evaluation.patience": ((None,), "since the validation rows by which it chooses a round are the clients' own"),
    "run.keep_updates": ((False,), "since the folder would hold every client's update as it was"),
}
"""With whole clients hidden: the values that a setting may have, and why no other."""


def private_clients(settings: Settings) -> Iterator[Problem]:
    """Whole clients are hidden by one noised sum over a shared A, and by nothing else being released."""
    if settings.privacy.unit != "client":
        if settings.federation.sampling == "poisson" and settings.traits.runs_rounds:
            yield Problem(
                "federation.sampling",
                "poisson only with privacy.unit = client, whose rounds may have nobody in them",
                f"poisson with privacy.unit = {settings.privacy.unit}",
                "choose uniform or rows",
                ("privacy.unit",),
            )
        return
    if not settings.traits.freezes_a:
        yield Problem(
            "privacy.unit",
            f"client only with method.name = {either(table.names('freezes_a'))}, whose clients train B over one A that "
            "all share: noise on A and B both is no noise of a known size on their product",
            f"client with method.name = {settings.method.name}",
            "choose that method, or privacy.unit = row",
            ("method.name",),
        )
        return
    yield from _restricted(settings, _ONLY_WITH, "privacy.unit = client", "privacy.unit")
    if settings.federation.sampling == "poisson" and settings.sampling_rate >= 1.0:
        yield Problem(
            "federation.sampling",
            "poisson only with fewer clients per round than there are",
            f"poisson with all {settings.federation.num_clients}",
            "set federation.clients_per_round, or leave sampling out",
            ("federation.clients_per_round", "federation.num_clients"),
        )


_UNDER_MASKS: dict[str, tuple[tuple[Any, ...], str]] = {
    "method.weighting": (("rows", "uniform", "work"), "since tokens and norms are known of single updates only"),
    "method.initialisation": (("independent",), "since the sketches of the gradient would be seen"),
    "server.step": (
        ("plain", "momentum", "fedadam", "fedyogi", "fedadagrad"),
        "since fedexp reads the norm of each client's change, and adamw needs gradients",
    ),
    "server.robust": (("none",), "since it compares single updates, which nobody sees"),
    "federation.max_norm_ratio": ((100.0,), "since nobody sees the norm of a single update"),
    "federation.sampling": (("uniform", "rows"), "since a round of Poisson draws may be too small to hide anybody"),
    "training.moments": (("fresh", "own"), "since second moments would be seen beside the sum"),
    "training.control_variates": ((False,), "since how far clients move on average is taken from single updates"),
    "wire.dtype": (("fp32",), "since masked numbers cross in fixed point, at one scale for all"),
    "run.keep_updates": ((False,), "since there is no update to keep"),
}
"""Under masks: the values that a setting may have, and why no other."""
_SUMMED = {"masked": "needs a sum of factors", "sketch": "stacks products, whatever their ranks"}
_FEWEST = 3


def masked(settings: Settings) -> Iterator[Problem]:
    """What looks at single updates has no place where sums alone are seen; one of two clients knows the other's."""
    kind, wanted = settings.privacy.sum, settings.traits.secure_sum
    if kind == "plain" or wanted is None:
        return
    if kind != wanted:
        yield Problem(
            "privacy.sum",
            f"{wanted} with method.name = {settings.method.name}, which {_SUMMED[wanted]}",
            kind,
            f"set {wanted}, or choose {either(table.names('sums_factors' if kind == 'masked' else 'stacks_products'))}",
            ("method.name",),
        )
        return
    under = {name: own for name, own in _UNDER_MASKS.items() if kind == "masked" or name != "method.initialisation"}
    yield from _restricted(settings, under, f"privacy.sum = {kind}", "privacy.sum")
    drawn, threshold = settings.cohort_size, settings.privacy.threshold
    if drawn < _FEWEST:
        yield Problem(
            "privacy.sum",
            f"{kind} only with {_FEWEST} clients a round or more, since one of two knows the other's update",
            f"{kind} with {drawn}",
            "draw more clients, or set privacy.sum = plain",
            ("federation.clients_per_round", "federation.num_clients"),
        )
    elif threshold is not None and not 2 * drawn < 3 * threshold <= 3 * drawn:
        yield Problem(
            "privacy.threshold",
            f"more than two thirds of the {drawn} clients of a round and no more than all, so that a server that lies "
            "cannot open one's update",
            str(threshold),
            f"set {2 * drawn // 3 + 1} to {drawn}, or leave it out",
            ("federation.clients_per_round", "federation.num_clients"),
        )


def sketched(settings: Settings) -> Iterator[Problem]:
    """No sum has a higher rank than its clients have together."""
    rank, most = settings.privacy.sketch_rank, settings.ranks_of_a_round
    if settings.privacy.sum == "sketch" and settings.traits.stacks_products and rank is not None and rank > most:
        yield Problem(
            "privacy.sketch_rank",
            f"at most {most}, to which the ranks of a round's clients add up",
            str(rank),
            "lower it, or leave it out",
            ("method.ranks", "federation.clients_per_round"),
        )


def noise_of_clients(settings: Settings) -> Iterator[Problem]:
    """A client adds noise wherever another one's change may be: all have one rank."""
    if settings.privacy.noise == "clients" and len(set(settings.client_ranks)) > 1:
        yield Problem(
            "privacy.noise",
            "clients only with one method.ranks for all, since a client of a smaller rank could not hide what others "
            "add beyond it",
            f"clients with ranks {min(settings.client_ranks)} to {max(settings.client_ranks)}",
            "set one rank, or privacy.noise = server",
            ("method.ranks",),
        )


def _restricted(
    settings: Settings, allowed_of: Mapping[str, tuple[tuple[Any, ...], str]], why: str, about: str
) -> Iterator[Problem]:
    """Refuse each setting that has none of the values allowed."""
    fields = dict(every_setting())
    for name, (allowed, reason) in allowed_of.items():
        if (value := settings.value(name)) not in allowed:
            is_default_allowed = fields[name].get_default() in allowed
            yield Problem(
                name,
                f"{either(map(_written, allowed))} with {why}, {reason}",
                shown(value),
                f"leave it out (--set {name}=)" if is_default_allowed else f"set {name} = {allowed[0]}",
                (about,),
            )


def _written(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else shown(value)
