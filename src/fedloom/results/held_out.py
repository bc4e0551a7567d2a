"""Held-out loss and perplexity of a result beside its base's, on the run's own rows or on others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.assembly.inputs import Inputs, Workshop, encode_rows
from fedloom.config.input_tables import Data
from fedloom.data.encoding import Encoded, EncodingCounts
from fedloom.data.groups import Grouping, grouping_of
from fedloom.data.sources import Rows, Split, load_rows
from fedloom.data.templates import check_template
from fedloom.data.text_files import read_utf8
from fedloom.data.tokens import TokenSet
from fedloom.errors import DataError
from fedloom.evaluation.intervals import Difference
from fedloom.evaluation.perplexity import Perplexity, compare_perplexity, measure_perplexity, plain_text_rows
from fedloom.results.opened_result import Found, OpenedResult
from fedloom.run_folder.contents import read_file
from fedloom.run_folder.durable import plain
from fedloom.wording import Displayed

BASE = "base"
VALIDATION = "validation"
MOST_MODELS_BY_GROUP = 6
TEXT = "text"
"""The shape of a file that is one text, every token of which is predicted."""


@dataclass(frozen=True)
class RowChoice:
    """Which rows to predict and how they are read; what is None is as in the run, or the reader's own default."""

    path: str | None = None
    shape: str | None = None
    template: str | None = None
    max_length: int | None = None
    overlong: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in self.__dict__.items() if value is not None]
        if given and self.path is None:
            raise DataError(
                f"expected a path with {', '.join(given)}, got none (a run's own rows are read as in the run); name "
                "rows with path, or drop these"
            )

    @cached_property
    def rows(self) -> Rows:
        """The rows of the path, read once.

        Raises:
            DataError: they are not there, or cannot be read.
        """
        assert self.path is not None
        return load_rows(self.path, Split.TEST)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows to predict, the text that each row's supervised tokens spell, where they are from, and their groups.

    ``counts`` say how many rows of a file were used, and how many skipped and why.
    """

    tokens: TokenSet
    texts: list[str]
    source: str
    grouping: Grouping | None = None
    counts: EncodingCounts | None = None


@dataclass(frozen=True, eq=False)
class Measured(Displayed):
    """Perplexities by name, ``base`` first, and each adapter's difference from the base in nats per byte."""

    path: Path
    held_out: HeldOut
    scores: Mapping[str, Perplexity]
    differences: Mapping[str, Difference]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        scores = {}
        for name, score in self.scores.items():
            per = {f"nats_per_{unit}": getattr(score, f"nats_per_{unit}") for unit in ("token", "byte", "word")}
            scores[name] = {"perplexity": score.per_token, **per}
        first = self.scores[BASE]
        return {
            "result": str(self.path),
            "data": self.held_out.source,
            "data_sha256": self.held_out.tokens.sha256(),
            "num_rows": first.num_rows,
            "num_loss_tokens": first.num_loss_tokens,
            "num_bytes": first.num_bytes,
            "num_words": first.num_words,
            **({"row_counts": counts.as_dict()} if (counts := self.held_out.counts) else {}),
            "scores": plain(scores),
            "differences_from_base_in_nats_per_byte": plain(dict(self.differences)),
            "mean_loss_nats": self.mean_nats,
            **({"loss_nats_of_group": groups} if (groups := self.of_group()) else {}),
        }

    def of_group(self) -> dict[str, dict[str, float]]:
        """Return by group of rows the nats per token of every model."""
        if self.held_out.grouping is None:
            return {}
        return {
            group: {
                name: float(score.rows.nats_N[which].sum() / score.rows.token_N[which].sum())
                for name, score in self.scores.items()
            }
            for group, which in self.held_out.grouping.members()
        }

    @property
    def mean_nats(self) -> float:
        """Mean over the adapters of the nats per token; the base's where there is none."""
        names = [name for name in self.scores if name != BASE] or [BASE]
        return math.fsum(self.scores[name].nats_per_token.value for name in names) / len(names)

    def lines(self) -> list[str]:
        """Return the figures for people."""
        first = self.scores[BASE]
        lines = [
            f"{self.held_out.source}: {first.num_rows:,} rows, {first.num_loss_tokens:,} tokens to predict, "
            f"{first.num_bytes:,} bytes, {first.num_words:,} words",
            *([counts.told] if (counts := self.held_out.counts) and counts.told else []),
            f"{'':<12} {'nats per token':>28} {'per byte':>28} {'per word':>28} {'perplexity':>11}",
        ]
        for name, score in self.scores.items():
            per = (score.nats_per_token, score.nats_per_byte, score.nats_per_word)
            figures = " ".join(f"{e.bounded:>28}" for e in per)
            lines.append(f"{name:<12} {figures} {score.per_token:>11.3f}")
        if len(self.scores) > 2:
            lines.append(f"mean over {len(self.scores) - 1} clients: {self.mean_nats:.4f} nats per token")
        lines += [f"{name} − base, nats per byte: {found}" for name, found in self.differences.items()]
        return lines + self._group_lines()

    def _group_lines(self) -> list[str]:
        groups, grouping = self.of_group(), self.held_out.grouping
        if grouping is None or len(self.scores) > MOST_MODELS_BY_GROUP:
            return []
        width = max(map(len, (*groups, grouping.column)))
        head = f"{grouping.column:<{width}} " + " ".join(f"{name:>9}" for name in self.scores) + "  nats per token"
        return [head] + [
            f"{group:<{width}} " + " ".join(f"{value:>9.4f}" for value in values.values())
            for group, values in groups.items()
        ]


def evaluate(opened: OpenedResult, choice: RowChoice | None = None, *, token_budget: int = 8192) -> Measured:
    """Measure every adapter of a result, and its base, on the same rows.

    Intervals are bootstraps over rows (95 %), and the differences are paired.

    Raises:
        DataError: there are no rows, or they cannot be read as asked.
    """
    held_out = held_out_rows(opened, choice or RowChoice())
    seed = 0 if opened.settings is None else opened.settings.run.seed
    scores: dict[str, Perplexity] = {}
    for name in (BASE, *opened.adapters):
        model = opened.use(None if name == BASE else name)
        scores[name] = measure_perplexity(model, held_out.tokens, held_out.texts, seed=seed, token_budget=token_budget)
    differences = {name: compare_perplexity(scores[name], scores[BASE], seed=seed) for name in opened.adapters}
    return Measured(opened.found.path, held_out, scores, differences)


def check_rows(found: Found, choice: RowChoice) -> None:
    """Refuse rows that are not there or cannot be read, before a base is loaded.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    if choice.path is None:
        _check_own_rows(found)
    elif choice.shape == TEXT:
        read_utf8(Path(choice.path))
    else:
        assert choice.rows
    if choice.template is not None:
        check_template(choice.template)


def _check_own_rows(found: Found) -> None:
    if found.settings is None:
        raise DataError(f"{found.path}: expected held-out rows, a PEFT folder has none; name some with --data FILE")


def held_out_rows(opened: OpenedResult, choice: RowChoice) -> HeldOut:
    """Return the rows that ``choice`` names, or a run's own held-out rows where it names none.

    Raises:
        DataError: there are none, or they cannot be read as asked.
    """
    tokenizer = opened.base.tokenizer
    if choice.path is None:
        tokens, rows = _own_rows(opened)
        return _held_out(opened, tokens, rows, f"the run's {_own_name(opened)} rows")
    if choice.shape == TEXT:
        text = read_utf8(Path(choice.path))
        return HeldOut(*plain_text_rows(opened.lora, tokenizer, [text]), choice.path)
    encoded, rows = _read_rows(opened, choice)
    return _held_out(opened, encoded.tokens, rows, choice.path, encoded.counts)


def _held_out(
    opened: OpenedResult, tokens: TokenSet, rows: Rows, source: str, counts: EncodingCounts | None = None
) -> HeldOut:
    column = None if opened.settings is None else opened.settings.partition.column
    return HeldOut(tokens, spelled_texts(tokens, opened.base.tokenizer), source, grouping_of(rows, column), counts)


def spelled_texts(rows: TokenSet, tokenizer: Any) -> list[str]:
    """Return per row the text that its supervised tokens spell, without special tokens.

    A stretch of tokens is decoded behind those before it, so that a space at its beginning is not lost.
    """
    return [_spelled(*rows.row(index), tokenizer) for index in range(len(rows))]


def _spelled(ids: np.ndarray[Any, Any], supervised: np.ndarray[Any, Any], tokenizer: Any) -> str:
    def decoded(stop: int) -> str:
        text = tokenizer.decode(ids[:stop].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(np.int8)))
    return "".join(
        decoded(stop)[len(decoded(start)) :]
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    )


def own_inputs(opened: OpenedResult) -> Inputs | None:
    """Return the rows of a run, read and partitioned as it did; None for a PEFT folder."""
    run = opened.found.run
    if opened.settings is None or run is None:
        return None
    saved = run.path / "partition.json"
    if saved.exists():
        read_file(run.path, run.manifest, saved.name)
    return Workshop().inputs(opened.settings, opened.base, saved if saved.exists() else None)


def scored_inputs(opened: OpenedResult) -> Inputs | None:
    """Return a run's rows as :func:`own_inputs` does, but those held out besides validation rows where there are any.

    Validation rows chose a round or settings: a result is scored on others.
    """
    settings = opened.settings
    if settings is None or _own_name(opened) == VALIDATION or settings.data.validation_fraction is None:
        return own_inputs(opened)
    data = settings.data.model_copy(update={"validation_fraction": None, "scored_seeds": ()})
    return Workshop().inputs(settings.model_copy(update={"data": data}), opened.base)


def _own_name(opened: OpenedResult) -> str:
    """Return what a run's own rows to score on are called: validation rows only where it holds out no others."""
    data = Data() if opened.settings is None else opened.settings.data
    holds_out = any(way is not None for way in (data.eval_path, data.eval_rows, data.eval_fraction))
    return VALIDATION if data.validation_fraction is not None and not holds_out else "held-out"


def _own_rows(opened: OpenedResult) -> tuple[TokenSet, Rows]:
    _check_own_rows(opened.found)
    inputs, path = scored_inputs(opened), opened.found.path
    assert inputs is not None
    if inputs.held_out is None or inputs.held_out_rows is None:
        raise DataError(f"{path}: expected held-out rows, the run has none; name some with --data FILE")
    return inputs.held_out, inputs.held_out_rows


def _read_rows(opened: OpenedResult, choice: RowChoice) -> tuple[Encoded, Rows]:
    """Return the rows of a file as tokens; those without an answer have nothing to predict and are skipped."""
    own = None if opened.settings is None else opened.settings.data
    data = own or Data(template=None)
    changes = {
        "shape": choice.shape or data.shape,
        "columns": data.columns if choice.shape in (None, data.shape) else {},
        "template": choice.template or (own and own.template),
        "max_length": choice.max_length or data.max_length,
        "overlong": choice.overlong or data.overlong,
        "unanswered": "drop",
    }
    rows, encoded = encode_rows(
        choice.rows,
        data.model_copy(update=changes),
        opened.base,
        named=lambda name: f"--{name.replace('_', '-')}",
    )
    return encoded, rows
