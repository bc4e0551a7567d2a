"""The rows that ship (train and held out, apart from each other) and the text the base is pretrained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from embedded import prose, tasks
from fedloom import seeding
from fedloom.data.records import Prompt
from fedloom.data.templates import load_template

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from embedded.tasks import Row

TRAIN_PER_CATEGORY = 400
EVAL_PER_CATEGORY = 40


def prompt_and_answer(row: Row) -> tuple[str, str]:
    """Return a row's text in the template 'plain': what is given, and what is to be written."""
    rendered = load_template("plain").render(Prompt(row.instruction, row.context, row.response))
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
        row = tasks.row(tasks.pick(rng, tuple(tasks.SEEN)), rng, seed)
        if (row.instruction, row.context) not in barred:
            pairs.append(prompt_and_answer(row))
    return pairs


def prose_text(count: int, seed: int) -> list[tuple[str, str]]:
    """Return ``count`` plain sentences, each as a pair with an empty prompt."""
    rng = seeding.stream(seed, "pretrain", "prose")
    shares = np.array(list(prose.SHARES.values()), dtype=np.float64)
    kinds = rng.choice(len(shares), size=count, p=shares / shares.sum())
    writers = tuple(prose.SHARES)
    return [("", writers[kind](rng, seed)) for kind in kinds]
