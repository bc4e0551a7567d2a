"""All that a run looks at before its folder is made: one list of steps, in their order.

``run`` takes them up to the first refusal; the doctor takes all that it can, over a base without its weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedloom.assembly.engine_choice import check_engine
from fedloom.assembly.inputs import Inputs, Workshop
from fedloom.assembly.round_plan import Population, plan_of, population_of, training_of
from fedloom.assembly.split_run import checked_plan
from fedloom.assembly.start_adapter import start_adapter
from fedloom.config import Settings
from fedloom.config.client_names import resolve_names, without_clients
from fedloom.data.sources import Split
from fedloom.errors import RunError
from fedloom.evaluation.suite_files import check_suite
from fedloom.federation.rounds import RoundPlan
from fedloom.lora.layer import LoRAModel
from fedloom.methods.side import digest
from fedloom.methods.traits import Kind
from fedloom.models.load import Base, check_quantization, choose_device
from fedloom.privacy.accountant import check_accountant
from fedloom.privacy.secure_sum.masks import check_masks
from fedloom.reporting.trackers import check_trackers
from fedloom.run_folder.claim import (
    is_begun,
    refuse_another,
    refuse_foreign,
    refuse_held,
    refuse_other_identity,
    refuse_unwritable,
)
from fedloom.run_folder.contents import read_file, rounds_done
from fedloom.run_folder.manifest import read_manifest
from fedloom.run_folder.run_date import date_in, today
from fedloom.run_folder.writer import MAY_CHANGE
from fedloom.split.plan import SplitPlan
from fedloom.training.row_losses import check_finite
from fedloom.wording import counted

ALONE = ("folder", "device", "engine", "accountant", "trackers", "quantization", "suites", "rows", "held_out_rows")
"""Steps that need no other."""
IN_TURN = ("loaded", "inputs", "placed", "plan", "identity", "numbers")
"""Steps of which each needs those before it."""


@dataclass(eq=False)
class Preparation:
    """What a run of the settings in ``out`` starts from. Each step is a property that raises what is in the way."""

    settings: Settings
    out: Path
    workshop: Workshop
    fresh: bool = False
    date: str | None = None

    def complete(self) -> None:
        """Take every step.

        Raises:
            FedloomError: the first thing in the way; nothing was written.
        """
        for step in (*ALONE, *IN_TURN):
            getattr(self, step)

    @cached_property
    def folder(self) -> tuple[str, ...]:
        """The settings that may differ from those of the run that the folder holds."""
        return check_folder(self.out, self.settings, self.fresh)

    @cached_property
    def engine(self) -> None:
        """What the engine needs is installed."""
        check_engine(self.settings)

    @cached_property
    def accountant(self) -> None:
        """What counts the cost of privacy, and what masks sums, is installed."""
        if self.settings.privacy.unit != "none":
            check_accountant()
        if self.settings.privacy.sum != "plain":
            check_masks()

    @cached_property
    def trackers(self) -> None:
        """What the trackers need is installed."""
        check_trackers(self.settings.run.trackers)

    @cached_property
    def device(self) -> torch.device:
        """Where the base is computed."""
        return choose_device(self.settings.model.device)

    @cached_property
    def quantization(self) -> None:
        """What quantises the base is installed."""
        check_quantization(self.settings.model.quantization)

    @cached_property
    def suites(self) -> None:
        """The files of the suites hold what is asked of them."""
        data, evaluation = self.settings.data, self.settings.evaluation
        ways = (data.eval_path, data.eval_rows, data.eval_fraction, data.validation_fraction)
        holds_out = any(one is not None for one in ways)
        for suite in evaluation.suites:
            check_suite(suite, evaluation.paths, holds_out=holds_out)

    @cached_property
    def rows(self) -> int:
        """How many rows are read for training; they have the columns that they need."""
        data = self.settings.data
        return len(self.workshop.read(self.settings, data.path, Split.TRAIN, data.max_rows))

    @cached_property
    def held_out_rows(self) -> int | None:
        """How many held-out rows are read from elsewhere."""
        data = self.settings.data
        name = data.eval_path if data.validation_fraction is None else None
        return None if name is None else len(self.workshop.read(self.settings, name, Split.TEST, None))

    @cached_property
    def began(self) -> Settings:
        """The settings on the day on which the run began, which chat templates are told."""
        return self.settings.on(date_in(self.out, self.fresh) or self.date or today())

    @cached_property
    def loaded(self) -> tuple[Base, LoRAModel]:
        """The base, and its target modules."""
        return self.workshop.base(self.settings)

    @cached_property
    def inputs(self) -> Inputs:
        """The rows as tokens, with their owners: a begun run keeps its own partition."""
        saved = self.out / "partition.json"
        if not is_begun(self.out) or not saved.exists() or self.fresh:
            return self.workshop.inputs(self.began, self.loaded[0])
        read_file(self.out, read_manifest(self.out), saved.name)
        return self.workshop.inputs(self.began, self.loaded[0], saved)

    @cached_property
    def placed(self) -> Settings:
        """The settings with a value per client, in the partition's order."""
        names = self.inputs.partition.names
        return resolve_names(without_clients(self.began, names, self.inputs.left_out), names)

    @cached_property
    def population(self) -> Population:
        """The clients."""
        return population_of(self.placed, self.inputs)

    @cached_property
    def plan(self) -> RoundPlan | SplitPlan | None:
        """What stays the same from round to round; None where nothing is trained."""
        lora = self.loaded[1]
        match self.settings.traits.kind:
            case Kind.UNTRAINED:
                return None
            case Kind.SPLIT:
                plan: RoundPlan | SplitPlan = checked_plan(self.placed, [*self.population.num_rows.values()], lora)
            case Kind.FEDERATED | Kind.CONTROL:
                plan = plan_of(self.placed, self.population, lora)
        if not self.fresh:
            refuse_fewer_rounds(self.out, plan.num_rounds)
        return plan

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a begun run is of, by name; without the base where its weights were not read."""
        inputs, held = self.inputs, self.inputs.held_out_counts
        found = {
            "date": self.began.data.date,
            "base_sha256": self.loaded[0].revision_hash,
            "data_sha256": inputs.data_sha256,
            "held_out_sha256": inputs.held_out_sha256,
            "partition_sha256": inputs.partition_sha256,
            "row_counts": inputs.counts.as_dict(),
            "held_out_row_counts": None if held is None else held.as_dict(),
        }
        if self.settings.data.unit_column is not None and inputs.tokens.units is not None:
            found["units_sha256"] = hashlib.sha256(inputs.tokens.units.astype("<i8").tobytes()).hexdigest()
        if (start := start_adapter(self.settings.model)) is not None:
            found["adapter_sha256"] = digest(start)
        if not found["base_sha256"]:
            del found["base_sha256"]
        if is_begun(self.out) and not self.fresh:
            refuse_other_identity(self.out, read_manifest(self.out)["identity"], found)
        return found

    @cached_property
    def numbers(self) -> None:
        """The base gives finite numbers on some of the rows."""
        check_finite(self.loaded[1], self.inputs.tokens, token_budget=self.settings.training.token_budget)


def check_folder(out: Path, settings: Settings, fresh: bool, also: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Check, before anything is loaded, that a run of the settings can be in ``out``; return what may differ there.

    ``also`` are settings that may differ besides those that may in every run.

    Raises:
        RunError: the folder holds something else, or a run of other settings; it cannot be made, or is in use.
    """
    may_change = MAY_CHANGE if is_extensible(settings) else tuple(set(MAY_CHANGE) - {"federation.num_rounds"})
    may_change += also
    if fresh:
        refuse_foreign(out)
    else:
        refuse_another(out, settings.as_dict(), may_change)
    refuse_unwritable(out)
    refuse_held(out)
    return may_change


def refuse_fewer_rounds(out: Path, num_rounds: int) -> None:
    """Check that a run has not completed more rounds than are asked for.

    Raises:
        RunError: it has.
    """
    if (done := len(rounds_done(out))) > num_rounds:
        raise RunError(
            f"{out}: expected at least the {counted(done, 'round')} it has completed, got {num_rounds}; set "
            f"federation.num_rounds to {done} or more, choose another folder, or start over with --fresh"
        )


def is_extensible(settings: Settings) -> bool:
    """Tell whether more rounds leave the rounds before as they are.

    They do not where one schedule spans the run, nor where a split run's last aggregation period is cut short.
    """
    if settings.traits.is_cut:
        steps = settings.training.local_steps
        return (
            settings.training.schedule == "constant"
            and steps is not None
            and steps % settings.split.aggregate_every == 0
        )
    return settings.training.schedule == "constant" or training_of(settings).schedule_span == "round"
