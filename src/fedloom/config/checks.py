"""What one setting demands of another: alternatives, applicability, lists per client, methods and ranks.

Every check looks at typed settings only, opens no file, and yields problems instead of raising, so that all are
reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedloom.config.privacy_checks import masked, noise_of_clients, private_clients, private_rows, sketched
from fedloom.config.problems import Problem
from fedloom.config.round_checks import (
    canaries,
    continued,
    control_variates,
    few_bits,
    initialisation,
    robust,
    sampling,
    synchronised,
    turning,
)
from fedloom.config.schema import PER_CLIENT, Settings, counted_by_data, every_setting
from fedloom.config.setting import Values, conditions, in_words, shown, values_of
from fedloom.methods import table
from fedloom.wording import either

HOLD_OUTS = ("data.eval_path", "data.eval_rows", "data.eval_fraction")
DURATIONS = ("training.local_steps", "training.local_epochs")
ALTERNATIVES = (DURATIONS, HOLD_OUTS)

DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
LARGEST, LARGEST_POPULATION, LARGEST_SEED = 10**9, 10**6, 2**63
COLUMN_SCHEMES = ("dirichlet", "shards", "category")


def problems(settings: Settings) -> list[Problem]:
    """Return everything that does not fit together."""
    if beyond := list(sizes(settings)):
        return beyond  # other checks would count up to them
    checks = (
        *(
            alternatives,
            applicability,
            lists,
            ranks,
            weighting,
            initialisation,
            numbers,
            robust,
            synchronised,
            control_variates,
            few_bits,
            turning,
            sampling,
        ),
        *(columns, batches, suites, cuts, devices, validation, stopping, tracking, continued, canaries),
        *(private_rows, private_clients, masked, sketched, noise_of_clients),
    )
    return [problem for check in checks for problem in check(settings)]


def sizes(settings: Settings) -> Iterator[Problem]:
    """Numbers that no run could reach are refused at once; a device's own speed and memory may be any."""
    limits = dict.fromkeys(("run.seed", "data.scored_seeds"), LARGEST_SEED)
    limits |= {"federation.num_clients": LARGEST_POPULATION}
    for name, _ in every_setting():
        value, limit = settings.value(name), limits.get(name, LARGEST)
        numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, int | float)]
        largest = max(map(abs, numbers), default=0)
        if largest > limit and not name.startswith("devices."):
            yield Problem(name, f"at most {limit:,}", f"{largest:,}", "lower it, or leave it out for its default")


def alternatives(settings: Settings) -> Iterator[Problem]:
    """Exactly one duration; at most one way to hold rows out."""
    # A method that trains nothing has no duration, and applicability refuses one. So a recipe's duration goes with the
    # rest of [training] where an untrained variant is derived from it, and it is missed where a recipe of the untrained
    # base is turned into another method's.
    least_duration = 1 if settings.traits.is_trained else 0
    for names, least in ((DURATIONS, least_duration), (HOLD_OUTS, 0)):
        given = [name for name in names if settings.value(name) is not None]
        wanted = ("exactly one of " if least else "at most one of ") + ", ".join(names)
        if len(given) > 1:
            got = " and ".join(f"{name.partition('.')[2]} = {shown(settings.value(name))}" for name in given)
            yield Problem(given[0], wanted, got, f"remove {given[1]} or {given[0]}", names)
        elif len(given) < least:
            yield Problem(names[0], wanted, "none", f"set one, e.g. {names[0]} = 10", names)


def inapplicable(settings: Settings) -> Iterator[tuple[str, str, Values]]:
    """Yield each setting given against its conditions, with the setting it depends on and the values that would do."""
    for name, field in every_setting():
        for other, values in conditions(field).items():
            if settings.value(name) != field.get_default() and settings.value(other) not in values:
                yield name, other, values


def applicability(settings: Settings) -> Iterator[Problem]:
    """A setting that would be ignored is rejected, unless it has its default value."""
    for name, other, values in inapplicable(settings):
        wanted = f"{name} only with {other} = {in_words(values)}"
        got = f"{shown(settings.value(name))} with {other} = {settings.value(other)}"
        yield Problem(name, wanted, got, f"drop it (--set {name}=) or change {other}", (other,))


def lists(settings: Settings) -> Iterator[Problem]:
    """A list or table per client has as many entries as there are clients, and a list of layers has any."""
    if settings.model.target_modules == ():
        wanted = "at least one name or pattern"
        yield Problem("model.target_modules", wanted, "none", "drop it (--set model.target_modules=)")
    clients = settings.federation.num_clients
    for name in PER_CLIENT:
        value = settings.value(name)
        if isinstance(value, tuple | dict) and len(value) != clients:
            others = f"give {clients}, or set federation.num_clients = {len(value)}"
            if counted_by_data(settings):
                others = "give one per client of the data"
            yield Problem(
                name,
                f"one value, or {clients} (one per client)",
                f"{len(value)} {'values' if isinstance(value, tuple) else 'names'}",
                others if value else f"give one value, or {clients}",
                ("federation.num_clients",),
            )


def ranks(settings: Settings) -> Iterator[Problem]:
    """A mean of factors needs equal ranks, of a cut model's halves too."""
    if settings.traits.needs_one_rank:
        yield from _equal_ranks(settings, "method.ranks", "method.name", "aggregates")
    if settings.traits.is_cut and table.traits_of(settings.split.aggregation).needs_one_rank:
        name = "method.ranks" if settings.split.client_rank is None else "split.client_rank"
        yield from _equal_ranks(settings, name, "split.aggregation", "aggregates_split")


def _equal_ranks(settings: Settings, name: str, chooser: str, trait: str) -> Iterator[Problem]:
    value = settings.value(name)
    instead = either(one for one in table.names(trait) if not table.traits_of(one).needs_one_rank)
    if len(set(values_of(value))) > 1:
        yield Problem(
            name,
            f"one rank for all clients with {chooser} = {settings.value(chooser)}",
            shown(value),
            f"set {chooser} to {instead}, which take different ranks",
            (chooser,),
        )


def weighting(settings: Settings) -> Iterator[Problem]:
    """A weighting is one that the method knows; a method without weights is judged by :func:`applicability`."""
    method, known = settings.method, settings.traits.weightings
    if known and method.weighting not in known:
        others = [one for one in table.names("aggregates") if method.weighting in table.traits_of(one).weightings]
        yield Problem(
            "method.weighting",
            f"{either(known)} with method.name = {method.name}",
            shown(method.weighting),
            f"choose one of those, or method.name = {either(others)}" if others else "choose one of those",
            ("method.name",),
        )


def numbers(settings: Settings) -> Iterator[Problem]:
    """Clients drawn exist; a round can reach its minimum; there are rows enough for every client."""
    federation, data, fixed = settings.federation, settings.data, counted_by_data(settings)
    if isinstance(federation.clients_per_round, int) and federation.clients_per_round > federation.num_clients:
        yield Problem(
            "federation.clients_per_round",
            f"at most federation.num_clients = {federation.num_clients}",
            str(federation.clients_per_round),
            "lower it" if fixed else "lower it, or raise federation.num_clients",
            ("federation.num_clients",),
        )
    elif federation.min_clients > settings.cohort_size:
        can_draw_more = federation.min_clients <= federation.num_clients
        raised = "federation.clients_per_round" if can_draw_more else "federation.num_clients"
        yield Problem(
            "federation.min_clients",
            f"at most the {settings.cohort_size} clients drawn per round",
            str(federation.min_clients),
            f"lower it, or raise {raised}" if can_draw_more or not fixed else "lower it",
            ("federation.clients_per_round", "federation.num_clients"),
        )
    needed = federation.num_clients * settings.partition.min_rows + (data.eval_rows or 0)
    if data.max_rows is not None and data.max_rows < needed:
        yield Problem(
            "data.max_rows",
            f"at least {needed} rows (partition.min_rows per client, and data.eval_rows)",
            str(data.max_rows),
            "raise it, or lower partition.min_rows" if fixed else "raise it, or lower federation.num_clients",
            ("federation.num_clients", "partition.min_rows", "data.eval_rows"),
        )


def columns(settings: Settings) -> Iterator[Problem]:
    """Schemes that distinguish rows need the column to do it by."""
    partition = settings.partition
    if partition.scheme in COLUMN_SCHEMES and partition.column is None and partition.path is None:
        yield Problem(
            "partition.column",
            f"the name of a column with partition.scheme = {partition.scheme}",
            "none",
            'set it, e.g. partition.column = "category"',
            ("partition.scheme",),
        )


def batches(settings: Settings) -> Iterator[Problem]:
    """A micro-batch is a part of the batch; a client that takes one step is at its start, where nothing pulls."""
    training = settings.training
    if training.proximal > 0.0 and training.local_steps == 1:
        yield Problem(
            "training.proximal",
            "0 with training.local_steps = 1, whose one step is taken where the term is zero",
            shown(training.proximal),
            "drop it (--set training.proximal=) or raise training.local_steps",
            ("training.local_steps",),
        )
    if training.micro_batch_size is not None and training.micro_batch_size > training.batch_size:
        yield Problem(
            "training.micro_batch_size",
            f"at most training.batch_size = {training.batch_size}",
            str(training.micro_batch_size),
            "lower it, or drop it for the whole batch",
            ("training.batch_size",),
        )


def suites(settings: Settings) -> Iterator[Problem]:
    """Paths are given for suites that are asked for."""
    asked = settings.evaluation.suites
    for suite in settings.evaluation.paths:
        if suite not in asked:
            yield Problem(
                "evaluation.paths",
                "names from evaluation.suites = " + shown(asked),
                shown(suite),
                "add it to evaluation.suites, or remove its path",
                ("evaluation.suites",),
            )


def cuts(settings: Settings) -> Iterator[Problem]:
    """A frozen client half has no adapters to size or aggregate; no gradients come back, unless from clients' tails."""
    split = settings.split
    if split.client_half != "frozen":
        return
    unused = ["client_rank", "aggregation"]
    unused += ["gradient_wire_dtype", "error_feedback"] if split.labels == "server" else []
    for key in unused:
        value, default = getattr(split, key), type(split).model_fields[key].get_default()
        if value != default:
            yield Problem(
                f"split.{key}",
                f"split.{key} only with split.client_half = trained",
                f"{shown(value)} with split.client_half = frozen",
                "drop it, or set split.client_half = trained",
                ("split.client_half", "split.labels"),
            )


def validation(settings: Settings) -> Iterator[Problem]:
    """Rows that runs of several seeds are scored on are drawn from those that validation rows come from."""
    data = settings.data
    draws = data.eval_rows is not None or data.eval_fraction is not None
    if data.scored_seeds and not (data.validation_fraction is not None and draws):
        yield Problem(
            "data.scored_seeds",
            "data.scored_seeds only with data.validation_fraction, and held-out rows from data.eval_rows or "
            "data.eval_fraction",
            shown(data.scored_seeds),
            "drop it (--set data.scored_seeds=)",
            ("data.validation_fraction", "data.eval_rows", "data.eval_fraction"),
        )


def stopping(settings: Settings) -> Iterator[Problem]:
    """A run stops early on rows that it is not scored on, and by looking at them now and then."""
    patience, data = settings.evaluation.patience, settings.data
    if patience is not None and data.validation_fraction is None:
        yield Problem(
            "evaluation.patience",
            "evaluation.patience only with data.validation_fraction, rows to choose a round on that are not scored on",
            shown(patience),
            "set data.validation_fraction, e.g. 0.1, or drop it (--set evaluation.patience=)",
            ("data.validation_fraction",),
        )
    if patience is not None and settings.evaluation.every == 0:
        yield Problem(
            "evaluation.every",
            "evaluations between rounds for evaluation.patience to count",
            "0",
            "set evaluation.every to 1 or more, or drop evaluation.patience",
            ("evaluation.patience",),
        )


def tracking(settings: Settings) -> Iterator[Problem]:
    """TensorBoard's files know no project, group or tag: these are for the other trackers."""
    for key in ("project", "group", "tags") if not settings.run.trackers else ():
        if value := getattr(settings.run, key):
            yield Problem(
                f"run.{key}",
                f"run.{key} only with run.trackers",
                shown(value),
                f"add a tracker to run.trackers, or drop it (--set run.{key}=)",
                ("run.trackers",),
            )


def devices(settings: Settings) -> Iterator[Problem]:
    """The device's name is one that torch knows; whether this machine has it, running shows."""
    device = settings.model.device
    if not DEVICE.fullmatch(device):
        yield Problem("model.device", "auto, cpu, cuda, cuda:N or mps", shown(device), "choose one of those")
