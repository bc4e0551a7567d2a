"""The rows that ship (train and held out, apart from each other) and the text the base is pretrained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from embedded import prose, tasks
from fedloom import seeding
from fedloom.data.records import Prompt
from fedloom.data.templates import load_template

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from embedded.tasks import Row
    from fedloom.data.templates import Template

Kind = TypeVar("Kind")
TRAIN_PER_CATEGORY = 400
EVAL_PER_CATEGORY = 40
INSTRUCTION_SHARES = {"creatures": 2, "addition": 2, "extraction": 2, "sequence": 3, "mood": 1}


@cache
def _template() -> Template:
    return load_template("plain")


def prompt_and_answer(row: Row) -> tuple[str, str]:
    """Return a row's text in the template 'plain': what is given, and what is to be written."""
    rendered = _template().render(Prompt(row.instruction, row.context, row.response))
    return rendered.prompt, rendered.text[len(rendered.prompt) :]


def shipped_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Return train and evaluation rows: all different, every category in equal number, in mixed order."""
    train: list[Row] = []
    held_out: list[Row] = []
    for category in tasks.CATEGORIES:
        rng = seeding.stream(seed, "rows", category)
        rows: dict[tuple[str, str], Row] = {}
        while len(rows) < TRAIN_PER_CATEGORY + EVAL_PER_CATEGORY:
            row = tasks.row(category, rng, seed)
            rows.setdefault((row.instruction, row.context), row)
        held_out += list(rows.values())[:EVAL_PER_CATEGORY]
        train += list(rows.values())[EVAL_PER_CATEGORY:]
    return _mixed(train, seed, "train"), _mixed(held_out, seed, "eval")


def _mixed(rows: Sequence[Row], seed: int, name: str) -> list[Row]:
    """Return the rows in the order of a named stream."""
    return [rows[int(index)] for index in seeding.stream(seed, "order", name).permutation(len(rows))]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object per line, ASCII, line feeds on every system."""
    text = "".join(json.dumps(asdict(row), separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes(text.encode("ascii"))


def instruction_text(count: int, seed: int, without: Collection[Row]) -> list[tuple[str, str]]:
    """Return ``count`` (prompt, answer) pairs of the seen categories, none of which is in ``without``."""
    rng = seeding.stream(seed, "pretrain", "instructions")
    barred = {(row.instruction, row.context) for row in without}
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        row = tasks.row(_drawn(rng, INSTRUCTION_SHARES), rng, seed)
        if (row.instruction, row.context) not in barred:
            pairs.append(prompt_and_answer(row))
    return pairs


def prose_text(count: int, seed: int, without: Collection[Row]) -> list[tuple[str, str]]:
    """Return ``count`` sentences as (given, told) pairs; what the rows ``without`` ask about is not retold."""
    rng = seeding.stream(seed, "pretrain", "prose")
    barred = {prose.content(row) for row in without if row.category in prose.RETOLD}
    return [prose.told(_drawn(rng, prose.SHARES), rng, seed, barred) for _ in range(count)]


def retold(seed: int, held_out: Sequence[Row]) -> dict[str, list[tuple[str, str]]]:
    """Return prose on what is held out, by unseen category: the contents that were barred, the facts that were not."""
    rng = seeding.stream(seed, "retold")
    pairs: dict[str, list[tuple[str, str]]] = {
        kind: [write(rng, prose.content(row)) for row in held_out if row.category == kind]
        for kind, write in prose.RETOLD.items()
    }
    facts = {kind: [write(rng, seed) for _ in range(EVAL_PER_CATEGORY)] for kind, write in prose.FACTS.items()}
    return pairs | facts


def _drawn(rng: np.random.Generator, shares: Mapping[Kind, int]) -> Kind:
    """Return one of the keys, as often as its share says."""
    kinds, ends = list(shares), np.cumsum(list(shares.values()))
    return kinds[int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))]
