"""What a recipe would train, send and hold, worked out from the base's configuration without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom import embedded
from fedloom.assembly.divided_rows import known_names
from fedloom.assembly.inputs import lora_of
from fedloom.assembly.round_plan import sketch_rank_of
from fedloom.assembly.start_adapter import targets_of
from fedloom.config import Settings
from fedloom.config.client_names import resolve_names
from fedloom.config.schema import PER_CLIENT
from fedloom.data.hub_refusal import hub_refusal
from fedloom.data.own_code import own_code_refusal
from fedloom.data.sources import Rows
from fedloom.errors import ModelError
from fedloom.federation.sum_terms import threshold_of
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import rank_in
from fedloom.models.base_folder import read_config
from fedloom.models.fused import fuse_operators
from fedloom.models.load import DTYPES
from fedloom.models.row_attention import Attention
from fedloom.models.threads import BUILDING
from fedloom.preview.cut_table import CutTable, cut_table
from fedloom.preview.message_sizes import message_sizes
from fedloom.preview.planned_memory import PlannedMemory, planned_memory
from fedloom.preview.planned_time import PlannedTime, planned_time
from fedloom.preview.row_sample import known_rows, rows_here
from fedloom.preview.schedules import Schedule, proposed_schedules, schedule_lines
from fedloom.training.local_training import SKETCH_ROWS
from fedloom.training.skeleton import check_passes
from fedloom.wording import Displayed, counted, counted_rounds, first_line, written_bytes

if TYPE_CHECKING:
    from fedloom.preview.client_privacy import PlannedClients
    from fedloom.preview.privacy_costs import PlannedPrivacy

LISTED_CLIENTS = 100
"""Clients that have a line each."""
_ATTENTION_LINES: dict[Attention, str] = {
    "packed": "attention: packed, rows of a pass one behind the other without padding",
    "padded": "attention: padded, rows of a pass padded to the longest through the model's own forward; slower, and "
    "training.token_budget and evaluation.batch_tokens count the padding",
}


@dataclass(frozen=True)
class Description(Displayed):
    """A recipe's sizes. ``client`` lists are in the order of the clients; bytes are of serialised messages.

    ``names`` are those of the clients, None where only the rows name them. ``start_bytes`` are up and down of each of
    ``sketch_cohort_size`` clients where the first A comes from the gradient. ``summed_ranks`` are the rank of a sum
    that sketches give exactly, and the most that one can have (``privacy.sum = sketch``).

    A later download is exact where every client takes part in every round and no server step adds to it; for a
    compressed broadcast it is the most that can come.
    """

    settings: Mapping[str, Any]
    family: str
    target_modules: tuple[str, ...]
    num_base_parameters: int
    num_trained_parameters: tuple[int, ...]
    upload_bytes: tuple[int, ...]
    first_download_bytes: tuple[int, ...]
    download_bytes: tuple[int, ...]
    memory: PlannedMemory
    time: PlannedTime
    cohort_size: int
    client_ranks: tuple[int, ...]
    run_bytes: tuple[float, float]
    names: tuple[str, ...] | None = None
    cuts: CutTable | None = None
    schedules: tuple[Schedule, ...] = ()
    narrow_modules: Mapping[str, int] = field(default_factory=dict)
    sketch_cohort_size: int = 0
    start_bytes: tuple[int, int] = (0, 0)
    privacy: PlannedPrivacy | PlannedClients | None = None
    summed_ranks: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the description as plain values."""
        cuts = None if self.cuts is None else self.cuts.as_dict()
        schedules = [one.as_dict() for one in self.schedules]
        privacy = None if self.privacy is None else self.privacy.as_dict()
        planned = {"memory": self.memory.as_dict(), "time": self.time.as_dict()}
        return {**self.__dict__, "cuts": cuts, "schedules": schedules, "privacy": privacy, **planned}

    @property
    def memory_bytes(self) -> int:
        """Bytes that the run takes at its peak, beside Python and its libraries."""
        return self.memory.total_bytes

    def lines(self) -> list[str]:
        """Return the description for people."""
        share = 100 * max(self.num_trained_parameters) / self.num_base_parameters
        kinds = sorted({name.rpartition(".")[2] for name in self.target_modules})
        where = "a client" if self.cuts is None else "on a client's and the server's side of the cut together"
        name_of = str if self.names is None else self.names.__getitem__
        width = max(6, *map(len, self.names or [str(len(self.client_ranks) - 1)]))
        lines = [
            f"base: {self.settings['model']['base']}, {self.family} of {self.num_base_parameters:,} parameters; "
            f"adapters on {len(self.target_modules)} modules ({', '.join(kinds)})",
            *self.memory.lines(),
            *self.time.lines(),
            f"trained: at most {max(self.num_trained_parameters):,} parameters {where} ({share:.2f} % of the base)",
            *self._narrow_lines(),
            _ATTENTION_LINES[self.settings["model"]["attention"]],
            "",
            f"{'client':>{width}}  {'rank':>4}  {'trained':>12}  {'up a round':>11}  {'first down':>11}"
            f"  {'later down':>12}",
        ]
        sizes = (self.upload_bytes, self.first_download_bytes, self.download_bytes)
        rows = enumerate(zip(self.client_ranks, self.num_trained_parameters, *sizes, strict=True))
        # Of a population too large for a line each, neighbours of the same sizes share one.
        alike = groupby(rows, key=itemgetter(1) if len(self.num_trained_parameters) > LISTED_CLIENTS else None)
        for _, neighbours in alike:
            (k, (rank, trained, *of_messages)), *others = neighbours
            up, first, down = (written_bytes(size) if size else "–" for size in of_messages)
            name = f"{name_of(k)}–{name_of(others[-1][0])}" if others else name_of(k)
            lines.append(f"{name:>{width}}  {rank:>4}  {trained:>12,}  {up:>11}  {first:>11}  {down:>12}")
        if self.names is None:
            lines.append(self._unnamed_line())
        if self.sketch_cohort_size:
            up, down = map(written_bytes, self.start_bytes)
            lines.append(
                f"before the first round {counted(self.sketch_cohort_size, 'client')} sketch the gradient of "
                f"{SKETCH_ROWS} rows each: {up} up and {down} down a client, one round trip more"
            )
        if any(self.upload_bytes):
            up, down = (written_bytes(total) for total in self.run_bytes)
            federation = self.settings["federation"]
            rounds = counted_rounds(federation["num_rounds"], 1 if self.sketch_cohort_size else 0)
            lines.append(f"the whole run: about {up} up and {down} down, over all clients and {rounds}")
        cuts = [] if self.cuts is None else ["", *self.cuts.lines()]
        schedules = ["", *schedule_lines(self.schedules)] if self.schedules else []
        chosen = [f"{name} = {json.dumps(value)}" for name, value in self.chosen.items()]
        privacy = ["", *self.privacy.lines()] if self.privacy is not None else []
        return [
            *lines,
            *cuts,
            *privacy,
            *self._sum_lines(),
            *schedules,
            "",
            *chosen,
            "Settings not shown have their defaults; --json prints all.",
        ]

    def _unnamed_line(self) -> str:
        """Return what nobody knows of the clients yet, and what it decides."""
        counted_as = f"federation.num_clients = {len(self.client_ranks)}"
        if self.settings["partition"]["path"] is not None:
            found = f"The saved partition names the clients; a run refuses it where they are not {counted_as}."
        else:
            found = f"The rows name the clients; whether a run has {counted_as} of them is known once they are read."
        named = any(isinstance(self.chosen.get(name), dict) for name in PER_CLIENT)
        return f"{found} So is who has which of the named values." if named else found

    def _sum_lines(self) -> list[str]:
        """Return how clients' updates are summed, where the server sees the sum alone."""
        privacy = self.settings["privacy"]
        if (kind := privacy["sum"]) == "plain":
            return []
        stay = threshold_of(privacy["threshold"], self.cohort_size)
        found = f"sum: {kind}; the server sees no update, and of {self.cohort_size} clients a round {stay} must stay"
        if self.summed_ranks is None:
            return ["", found]
        exact, most = self.summed_ranks
        lost = f", and what it has beyond up to rank {most} is lost" if exact < most else ", as high as it can be"
        return ["", found, f"each module's sum is exact up to rank {exact}{lost}"]

    def _narrow_lines(self) -> list[str]:
        """Return which modules are narrower than a client's rank, by their last names."""
        taken = sorted({(name.rpartition(".")[2], rank) for name, rank in self.narrow_modules.items()})
        told = ", ".join(f"{name} (rank {rank})" for name, rank in taken)
        return [f"narrower than a rank, so adapted at what they can hold: {told}"] if taken else []

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by full name."""
        defaults = _flat(Settings().as_dict())
        return {name: value for name, value in _flat(self.settings).items() if value != defaults[name]}


def describe(settings: Settings, *, num_rows: int | None = None) -> Description:
    """Return the sizes of a recipe without loading weights; a cut recipe's rows are sampled for their length.

    Schedules are proposed for as many rows as the recipe trains on, or for ``num_rows`` where epochs leave that to the
    rows.

    Raises:
        ModelError: if the base's configuration cannot be read, or is of a model whose rows cannot pass as
            `model.attention` says.
        AdapterError: if a rank does not fit its modules.
    """
    written, rows = settings, rows_here(settings)
    names = known_names(settings, rows)
    if names is not None:
        settings = resolve_names(settings, names)
    lora = _sketched(settings)
    model: Any = lora.model
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    ranks = settings.client_ranks
    of_rank = {}  # clients may be a million, their ranks are few
    for rank in set(ranks):
        lora.check_rank(rank)
        of_rank[rank] = num_trained(lora, rank)
    trained = tuple(of_rank[rank] for rank in ranks)
    sizes = message_sizes(settings, lora, ranks)
    sample = known_rows(settings, model.config, rows)
    return Description(
        settings=written.as_dict(),
        family=str(model.config.model_type),
        target_modules=tuple(lora.shapes),
        narrow_modules=lora.narrow(max(ranks)) if settings.traits.is_trained else {},
        num_base_parameters=num_parameters,
        num_trained_parameters=trained,
        upload_bytes=sizes.of_clients("up"),
        first_download_bytes=sizes.of_clients("first_down"),
        download_bytes=sizes.of_clients("later_down"),
        memory=planned_memory(settings, lora, sample),
        time=planned_time(settings, lora, sample, sizes),
        cohort_size=settings.cohort_size,
        client_ranks=ranks,
        run_bytes=sizes.of_run(settings.cohort_size, settings.federation.num_rounds),
        names=None if names is None else tuple(names),
        schedules=proposed_schedules(settings, lora, sizes, num_rows),
        cuts=cut_table(settings, lora) if settings.traits.is_cut else None,
        sketch_cohort_size=sizes.sketch_cohort_size,
        start_bytes=sizes.start,
        privacy=_privacy(written),
        summed_ranks=None if (exact := sketch_rank_of(settings)) is None else (exact, settings.ranks_of_a_round),
    )


def memory_of(settings: Settings, rows: Rows | None) -> PlannedMemory:
    """Return the memory of a run on :func:`rows_here`, without the rest of its description.

    Raises:
        FedloomError: as for :func:`describe`.
    """
    if (names := known_names(settings, rows)) is not None:
        settings = resolve_names(settings, names)
    lora = _sketched(settings)
    model: Any = lora.model
    return planned_memory(settings, lora, known_rows(settings, model.config, rows))


def _sketched(settings: Settings) -> LoRAModel:
    """Return the base's shapes with its adapted modules, in the type that it would have."""
    model = skeleton(settings)
    check_passes(model, settings.model.attention)
    if isinstance(dtype := DTYPES[settings.model.dtype], torch.dtype):
        model = model.to(dtype)
    return lora_of(model, targets_of(settings.model))


def _privacy(settings: Settings) -> PlannedPrivacy | PlannedClients | None:
    from fedloom.preview.privacy_costs import planned_privacy  # it prepares a run over the skeleton that is made here

    return planned_privacy(settings)


def num_trained(lora: LoRAModel, rank: int) -> int:
    """Return the numbers in an adapter of this rank."""
    return sum(rank_in(shape, rank) * sum(shape) for shape in lora.shapes.values())


def skeleton(settings: Settings) -> Any:
    """Return the base with its shapes and without its numbers."""
    try:
        config = _config(settings)
        with BUILDING, torch.device("meta"):
            trusted = settings.model.trust_remote_code
            return fuse_operators(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted).eval())
    except ModelError:
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        if (refusal := own_code_refusal(error, settings.model.base)) is not None:
            raise refusal from error
        if isinstance(error, OSError) and not Path(embedded.base_path(settings.model.base)).expanduser().is_dir():
            wanted = "a folder or a name on the hub"
            raise ModelError(hub_refusal("model.base", wanted, settings.model.base, error)) from error
        reason = first_line(error)
        raise ModelError(
            f"model.base: expected a causal LM's configuration, got {settings.model.base!r} ({reason}); choose another "
            "base"
        ) from error


def _config(settings: Settings) -> Any:
    """Return the base's configuration; of a name on the hub it is all that is fetched."""
    name, trusted = str(embedded.base_path(settings.model.base)), settings.model.trust_remote_code
    if Path(name).expanduser().is_dir():
        return read_config(Path(name).expanduser(), trusted)
    return AutoConfig.from_pretrained(name, revision=settings.model.revision, trust_remote_code=trusted)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in settings.items() for key, value in keys.items()}
