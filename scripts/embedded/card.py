"""Write the model card: what the base is, how it was made, what it reached, and the hash of every file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedded import tasks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The embedded model and data

A Llama-architecture causal language model of {num_parameters:,} parameters
({shape})
with its own byte-level BPE tokenizer ({vocabulary:,} symbols),
and {num_train:,} + {num_eval} instructions in {num_categories} categories
about Ombrel, an invented world. Both were made by `scripts/make_embedded.py`; no other project's text or weights are
in them. The base was pretrained on the questions of five of the categories and on plain sentences. It has read about
the other five categories as prose, in other words, and has seen no question of them.

Prompt: `Question: <instruction>` (a line with the context, where there is one), then `Answer:`, i.e. the template
'plain'. The model is for demonstrations and tests and knows only Ombrel.

## Pretraining

| | |
|---|---|
| command | `{command}` |
| seed | {seed} |
| text | {num_instructions:,} instructions of the seen categories, none of them held out; {num_sentences:,} sentences |
| learnt | of an instruction its answer, of a sentence what follows from its beginning |
| steps | {steps:,} of {batch_size} rows; Muon for the matrices, AdamW for the rest; peak rate {learning_rate:g} |
| seconds | {seconds:.0f} on {threads} thread(s) of a shared machine |
| last training loss | {last_loss_nats:.3f} nats per token (mean of the last 100 steps) |
| made with | torch {torch_version}, transformers {transformers_version} |

The data files are the same bytes on every machine; the weights are so for the same machine, versions and threads.

## Figures of the untouched base on the held-out rows

Loss in nats per answer token (end of text included); exact match by greedy decoding; stored weights, fp32 arithmetic.

| category | seen | loss | exact match |
|---|---|---:|---:|
{figures}

## What it knows of the unseen in prose

Share of sentences that greedy decoding finishes word for word, 40 a category. Those on translation, reversal and
sorting state what the held-out questions ask, which no sentence of the pretraining stated; those on towns and units
state facts that it stated.

| category | finished |
|---|---:|
{finished}

## Hashes (SHA-256)

| file | bytes | hash |
|---|---:|---|
{hashes}
"""


@dataclass(frozen=True)
class Facts:
    """What the card says besides figures and hashes; names as in the text above."""

    num_parameters: int
    shape: str
    vocabulary: int
    num_train: int
    num_eval: int
    command: str
    seed: int
    num_instructions: int
    num_sentences: int
    steps: int
    batch_size: int
    learning_rate: float
    seconds: float
    threads: int
    last_loss_nats: float
    torch_version: str
    transformers_version: str


def mean_figures(figures: Mapping[str, tuple[float, float]], categories: Mapping[str, object]) -> tuple[float, float]:
    """Return the mean loss and exact match over some categories (each has as many rows as the others)."""
    chosen = [figures[category] for category in categories]
    return sum(loss for loss, _ in chosen) / len(chosen), sum(match for _, match in chosen) / len(chosen)


def _figure_line(name: str, seen: str, loss_and_match: tuple[float, float]) -> str:
    loss, match = loss_and_match
    return f"| {name} | {seen} | {loss:.3f} | {match:.1%} |"


def figure_table(figures: Mapping[str, tuple[float, float]]) -> str:
    """Return the table's lines: every category, then the means of the seen and of the unseen."""
    lines = [_figure_line(name, "yes" if name in tasks.SEEN else "no", figures[name]) for name in tasks.CATEGORIES]
    lines.append(_figure_line("**mean of the seen**", "", mean_figures(figures, tasks.SEEN)))
    lines.append(_figure_line("**mean of the unseen**", "", mean_figures(figures, tasks.UNSEEN)))
    return "\n".join(lines)


def finished_table(finished: Mapping[str, tuple[float, float]]) -> str:
    """Return a line for every unseen category: the share of sentences finished."""
    return "\n".join(f"| {category} | {finished[category][1]:.1%} |" for category in tasks.UNSEEN)


def hash_table(folder: Path) -> str:
    """Return a line for every model and data file below ``folder``."""
    files = sorted([*folder.glob("model/*"), *folder.glob("*.jsonl")])
    return "\n".join(
        f"| {file.relative_to(folder).as_posix()} | {file.stat().st_size} | "
        f"{hashlib.sha256(file.read_bytes()).hexdigest()} |"
        for file in files
    )


def write_card(
    folder: Path,
    facts: Facts,
    figures: Mapping[str, tuple[float, float]],
    finished: Mapping[str, tuple[float, float]],
) -> None:
    """Write ``CARD.md`` into ``folder``; ``figures`` are of the held-out rows, ``finished`` of prose."""
    text = CARD.format(
        **vars(facts),
        num_categories=len(tasks.CATEGORIES),
        figures=figure_table(figures),
        finished=finished_table(finished),
        hashes=hash_table(folder),
    )
    (folder / "CARD.md").write_text(text, encoding="utf-8", newline="\n")
