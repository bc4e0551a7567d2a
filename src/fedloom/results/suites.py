"""The papers' scores of a model as it stands: E2E metrics, multiple choice, exact matches, named as in a recipe.

A suite takes the base with an adapter beside it and gives named estimates, each with its interval and its n, so that
a run, a comparison and the command line show the same figures.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.config import Settings
from fedloom.config.conduct import Evaluation
from fedloom.data.records import Shape
from fedloom.data.templates import AUTO
from fedloom.evaluation.decoding import DecodingSettings
from fedloom.evaluation.intervals import Estimate, ItemStatistics
from fedloom.run_folder.durable import plain
from fedloom.wording import Displayed

PER_GROUP = "per_group"
MOST_GROUPS_SHOWN = 20


@dataclass(frozen=True)
class SuiteChoice:
    """What a suite reads and how: ``paths`` by suite, few-shot examples, items at most, decoding, wording.

    ``shape`` and ``columns`` say how rows are read, those of a path and held-out ones; ``group_by`` is the column by
    which their scores are reported, by default one that is called so.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    shots: int = 5
    limit: int | None = None
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    template: str = AUTO
    date: datetime.date | None = None
    token_budget: int = 8192
    seed: int = 0
    answering: str = "letter"
    shape: str = Shape.AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    group_by: str | None = None


@dataclass(frozen=True)
class SuiteScores(Displayed):
    """A suite's estimates by metric, and what a reader must know of how they came about.

    ``groups`` are the first metric's estimates by group of items (category, subject). ``items`` holds by metric what
    each item adds to it, for a paired comparison; it is not written anywhere.
    """

    suite: str
    estimates: Mapping[str, Estimate]
    notes: Mapping[str, Any]
    groups: Mapping[str, Estimate] = field(default_factory=dict)
    items: Mapping[str, ItemStatistics] = field(default_factory=dict, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        groups = {PER_GROUP: plain(dict(self.groups))} if self.groups else {}
        return {"suite": self.suite, "metrics": plain(dict(self.estimates)), **plain(dict(self.notes)), **groups}

    def lines(self) -> list[str]:
        """Return the figures for people; those of groups, where they are many, are only in :meth:`as_dict`."""
        shown = dict(self.estimates)
        if len(self.groups) <= MOST_GROUPS_SHOWN:
            shown |= {f"  {name}": estimate for name, estimate in self.groups.items()}
        width = max(map(len, shown), default=0)
        lines = [f"{name:<{width}}  {estimate}" for name, estimate in shown.items()]
        notes = {name: value for name, value in self.notes.items() if value not in (0, {})}
        return lines + [
            f"{name.replace('_', ' ')}: {f'{value:.4f}' if isinstance(value, float) else value}"
            for name, value in notes.items()
        ]


def suite_choice_of(settings: Settings | None) -> SuiteChoice:
    """Return what a recipe says of its suites; without a recipe, their defaults."""
    chosen = Evaluation() if settings is None else settings.evaluation
    choice = SuiteChoice(
        paths=chosen.paths,
        shots=chosen.shots,
        limit=chosen.limit,
        decoding=DecodingSettings(chosen.beams, chosen.length_penalty, chosen.no_repeat_ngram, chosen.max_new_tokens),
        token_budget=chosen.batch_tokens,
        answering=chosen.answering,
    )
    if settings is None:
        return choice
    data = settings.data
    return replace(
        choice,
        template=data.template or AUTO,
        date=data.day,
        seed=settings.run.seed,
        shape=data.shape,
        columns=data.columns,
        group_by=settings.partition.column,
    )
