"""What settings demand of one another where rounds of adapters are concerned: who is drawn, what crosses, who steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedloom.config.problems import Problem
from fedloom.config.schema import Settings, counted_by_data
from fedloom.config.setting import shown
from fedloom.methods import table
from fedloom.methods.traits import GRADIENT, Law
from fedloom.wording import either


def robust(settings: Settings) -> Iterator[Problem]:
    """Multi-Krum needs 2 f + 3 updates or more, the cosine filter clients that move in one space."""
    server, drawn = settings.server, settings.cohort_size
    needed = 2 * math.ceil(server.hostile_fraction * drawn) + 3
    others = ["clip", "median"] + ["krum"] * (drawn >= needed) + ["cosine"] * (not draws_apart(settings))
    if settings.server.robust == "cosine" and draws_apart(settings):
        shared = "" if settings.traits.is_cut else ", or method.initialisation = shared"
        yield Problem(
            "server.robust",
            f"{either(others)} where every client draws its own A, since their changes have no common direction",
            "cosine",
            f"choose one of those{shared}",
            ("method.name", "method.initialisation", "split.aggregation"),
        )
    if server.robust == "krum" and drawn < needed:
        yield Problem(
            "server.robust",
            f"krum with at least {needed} clients drawn per round (2 f + 3, where f may be hostile)",
            f"krum with {drawn}",
            f"choose {either(others)}" + ("" if counted_by_data(settings) else ", or draw more clients"),
            ("server.hostile_fraction", "federation.clients_per_round", "federation.num_clients"),
        )


def synchronised(settings: Settings) -> Iterator[Problem]:
    """A server's AdamW steps on the mean gradient of one batch a client, where a mean of factors is the method's."""
    if settings.server.step != "adamw" or not settings.traits.aggregates:
        return
    if not settings.traits.averages_factors:
        able = either(one for one in table.names("aggregates") if table.traits_of(one).averages_factors)
        yield Problem(
            "server.step",
            f"adamw only with method.name = {able}, whose start is the mean of the clients' factors",
            f"adamw with method.name = {settings.method.name}",
            "choose another step, or one of those methods",
            ("method.name",),
        )
    elif settings.training.local_steps != 1:
        duration = "local_epochs" if settings.training.local_steps is None else "local_steps"
        yield Problem(
            f"training.{duration}",
            "training.local_steps = 1 with server.step = adamw: a client sends the gradient of one batch",
            shown(settings.value(f"training.{duration}")),
            "set training.local_steps = 1 and raise federation.num_rounds by as much, or choose another server.step",
            ("server.step", "training.local_steps", "training.local_epochs"),
        )


def continued(settings: Settings) -> Iterator[Problem]:
    """An adapter that is trained is at hand, and takes the place of any other start."""
    if not settings.model.train_adapter:
        return
    if settings.model.adapter is None:
        yield Problem(
            "model.train_adapter",
            "model.train_adapter only with model.adapter",
            "true",
            "set model.adapter to a PEFT folder, or drop it (--set model.train_adapter=)",
            ("model.adapter",),
        )
    if settings.traits.aggregates and settings.method.initialisation == GRADIENT:
        yield Problem(
            "method.initialisation",
            "no start from the gradient with model.train_adapter, which is one",
            settings.method.initialisation,
            "drop it, or drop model.train_adapter",
            ("model.train_adapter",),
        )


def control_variates(settings: Settings) -> Iterator[Problem]:
    """Moves add up slot by slot where every client moves every slot, or those that it has not keep their numbers."""
    if not settings.training.control_variates:
        return
    if settings.training.local_steps == 1:
        yield Problem(
            "training.control_variates",
            "more steps a round than training.local_steps = 1, with whose one step no client drifts",
            "true",
            "drop it (--set training.control_variates=) or raise training.local_steps",
            ("training.local_steps",),
        )
    if len(set(settings.client_ranks)) > 1 and Law.NO_OP_RANKS in settings.traits.unclaimed:
        yield Problem(
            "training.control_variates",
            f"clients of one rank with method.name = {settings.method.name}, which counts missing slots as zero",
            f"ranks {min(settings.client_ranks)} to {max(settings.client_ranks)}",
            "drop it (--set training.control_variates=), or set one method.ranks for all",
            ("method.ranks", "method.name"),
        )


def initialisation(settings: Settings) -> Iterator[Problem]:
    """Where A comes from is what the method can do; a sketched gradient has no product whose norm could weigh it."""
    method, known = settings.method, settings.traits.initialisations
    if known and method.initialisation not in known:
        reason = " draws a fresh A every round" if settings.traits.starts_fresh else " draws no A but the first"
        yield Problem(
            "method.initialisation",
            f"{either(known)} with method.name = {method.name}, which{reason}",
            method.initialisation,
            "choose one of those, or another method",
            ("method.name",),
        )
    elif method.initialisation == GRADIENT and method.weighting == "norm":
        yield Problem(
            "method.weighting",
            "rows, tokens, uniform or work with method.initialisation = gradient, whose sketches are no products with "
            "a norm",
            method.weighting,
            "choose one of those, or another initialisation",
            ("method.initialisation",),
        )


def few_bits(settings: Settings) -> Iterator[Problem]:
    """What few bits round off must have a place to wait in."""
    if not settings.wire.dtype.startswith("int"):
        return
    if settings.traits.is_cut:
        yield Problem(
            "wire.dtype",
            "fp32, bf16 or fp16 with a cut model (split.wire_dtype is that of its activations)",
            settings.wire.dtype,
            "choose one of those",
            ("method.name",),
        )
    elif settings.traits.turns_slots:
        return  # never, see :func:`turning`
    elif settings.traits.grows_side and (settings.method.broadcast != "compressed" or not settings.method.tolerance):
        yield Problem(
            "wire.dtype",
            "few bits only with method.broadcast = compressed and a method.tolerance above 0, since what is rounded "
            "off comes on top of the next addition",
            f"{settings.wire.dtype} with method.broadcast = {settings.method.broadcast}, tolerance = "
            f"{settings.method.tolerance:g}",
            "set method.broadcast = compressed and method.tolerance, e.g. 0.02, or another wire.dtype",
            ("method.broadcast", "method.tolerance", "method.name"),
        )


def turning(settings: Settings) -> Iterator[Problem]:
    """What goes on slot by slot from one round to the next has no meaning where a slot is another direction by then."""
    method = settings.method.name
    if not settings.traits.turns_slots:
        return
    reason = f"with method.name = {method}, whose slots are other directions every round"
    if settings.training.moments != "fresh":
        yield Problem(
            "training.moments",
            f"fresh {reason}, so that no moment is that of its slot any more",
            settings.training.moments,
            "drop it (--set training.moments=), or choose another method",
            ("method.name",),
        )
    if settings.wire.dtype.startswith("int"):
        yield Problem(
            "wire.dtype",
            f"fp32, bf16 or fp16 {reason}: few bits hold a slot's small difference to what it was",
            settings.wire.dtype,
            "choose one of those, or another method",
            ("method.name",),
        )


def sampling(settings: Settings) -> Iterator[Problem]:
    """Rows count once: in the draw or in the weights; and everybody is no draw."""
    federation = settings.federation
    if federation.sampling != "rows":
        return
    if federation.clients_per_round is None or settings.cohort_size == federation.num_clients:
        yield Problem(
            "federation.sampling",
            "rows only with fewer clients per round than there are",
            f"rows with all {federation.num_clients}",
            "set federation.clients_per_round, or leave sampling out",
            ("federation.clients_per_round", "federation.num_clients"),
        )
    if settings.method.weighting in ("rows", "tokens") and settings.traits.sends_adapters:
        yield Problem(
            "method.weighting",
            "work, uniform or norm with federation.sampling = rows, which counts rows in the draw",
            settings.method.weighting,
            "choose one of those, or federation.sampling = uniform",
            ("federation.sampling",),
        )


def draws_apart(settings: Settings) -> bool:
    """Tell whether every client moves along a fresh A of its own."""
    if settings.traits.is_cut:
        return table.traits_of(settings.split.aggregation).starts_fresh
    return settings.traits.starts_fresh and settings.method.initialisation == "independent"


def canaries(settings: Settings) -> Iterator[Problem]:
    """Who gets canaries, and how often, has a meaning only where there are any."""
    data = settings.data
    if data.canaries:
        return
    for name, value in (("canary_clients", data.canary_clients), ("canary_repetitions", data.canary_repetitions)):
        if value not in ((), 1):
            yield Problem(
                f"data.{name}",
                f"data.{name} only with canaries",
                f"{shown(value)} with data.canaries = 0",
                f"drop it (--set data.{name}=) or set data.canaries",
                ("data.canaries",),
            )
