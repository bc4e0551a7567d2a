"""What an experiment starts from: the base with its slots, the rows as tokens, and who owns which."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.assembly.client_rows import own_rows
from fedloom.assembly.divided_rows import divided, partition_of
from fedloom.assembly.emptied_clients import emptied, natural_owners, without_emptied
from fedloom.assembly.start_adapter import lay_start, targets_of
from fedloom.assembly.token_cache import TokenCache
from fedloom.assembly.validation_rows import set_aside, unvalidated
from fedloom.config import Settings
from fedloom.config.input_tables import Data
from fedloom.data.canaries import Canary, Planting, plant
from fedloom.data.encoding import Encoded, EncodingCounts, encode
from fedloom.data.groups import by_unit
from fedloom.data.own_rows import OwnRows
from fedloom.data.partition import Partition
from fedloom.data.records import Records, read_records
from fedloom.data.sources import Rows, Split, load_rows
from fedloom.data.templates import AUTO
from fedloom.data.tokens import TokenSet
from fedloom.lora.layer import LoRAModel
from fedloom.models.causal import context_of, longest_row
from fedloom.models.families import ALL_LINEAR, resolve_targets
from fedloom.models.load import Base, load_base
from fedloom.models.threads import compute_with
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.seeding import stream
from fedloom.training.verified_head import output_head

_OF_ANY_READING = {"date", "eval_path", "eval_rows", "eval_fraction", "validation_fraction", "scored_seeds"}
_OF_ANY_READING |= {"canaries", "canary_clients", "canary_repetitions"}
"""Settings of the table [data] that change nothing of what is read under a name."""
MANY_ROWS = 10_000
"""Rows that take a while to be made into tokens, which is then said."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Training rows as tokens with their owners, and the held-out rows; hashes say which they are.

    ``counts`` are of the rows read for training, those drawn from them to be held out included; ``held_out_counts`` of
    held-out rows that were read from elsewhere. ``left_out`` are clients of which no row is usable for training.
    ``whole`` says who owns which row before rows of the clients' own, ``own``, were held out, and ``data_sha256`` is of
    all these; without such rows it is ``partition``. ``canaries`` are in ``tokens`` and ``partition``, behind the rows.
    """

    rows: Rows
    tokens: TokenSet
    partition: Partition
    held_out_rows: Rows | None
    held_out: TokenSet | None
    counts: EncodingCounts
    held_out_counts: EncodingCounts | None
    data_sha256: str
    held_out_sha256: str | None
    left_out: tuple[str, ...]
    whole: Partition
    own: OwnRows
    canaries: tuple[Canary, ...] = ()

    @property
    def dealt(self) -> Partition:
        """Who owns which of ``rows``: ``partition`` without the canaries."""
        if not self.canaries:
            return self.partition
        owner = self.partition.owner_of_row()[: len(self.rows)]
        return Partition.from_owners(owner, self.partition.names, self.partition.how)

    def rows_of(self, client: int) -> TokenSet:
        """Return one client's rows."""
        return self.tokens.select(self.partition.rows_of(client))

    @property
    def partition_sha256(self) -> str:
        """Hash of who owns which row."""
        digest = hashlib.sha256(self.partition.rows.astype("<i8").tobytes())
        digest.update(self.partition.starts.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass
class Workshop:
    """Holds one base, what it scores untouched, and encoded rows, so that a comparison loads and scores them once."""

    progress: Progress = field(default_factory=SilentProgress)
    cache: TokenCache = field(default_factory=TokenCache.of_environment)
    _base_key: str | None = None
    _base: tuple[Base, LoRAModel] | None = None
    _read: dict[str, Rows] = field(default_factory=dict)
    _records: dict[str, Records] = field(default_factory=dict)
    _rows: dict[str, tuple[Rows, Encoded, Rows]] = field(default_factory=dict)
    _base_scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)  # what is the same of all runs of a comparison is said once

    def base(self, settings: Settings) -> tuple[Base, LoRAModel]:
        """Return the base of the settings, wrapped, without slots or side, and checked to run as its rows pass.

        Raises:
            ModelError: if it cannot be loaded, or training would not give its own numbers.
        """
        compute_with(settings.engine.threads)
        key = settings.model.model_dump_json()
        if self._base is None or self._base_key != key:
            model = settings.model
            self.progress.note(f"loading base {model.base}")
            base = load_base(
                model.base,
                tokenizer=model.tokenizer,
                dtype=model.dtype,
                device=model.device,
                quantization=model.quantization,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                attention=model.attention,
            )
            lora = lora_of(base.model, targets_of(model))
            lay_start(model, base, lora)
            self._base, self._base_key = (base, lora), key
        lora = self._base[1]
        lora.close()
        lora.set_side(None)
        output_head(lora.model)
        return self._base

    def inputs(self, settings: Settings, base: Base, saved_partition: Path | None = None) -> Inputs:
        """Return the rows of the settings, held out and partitioned by the run's seed.

        ``saved_partition`` is a run's own; it takes the place of drawing one.

        Raises:
            DataError: if rows cannot be read or used.
            PartitionError: if they cannot be divided as asked, or a saved partition is of other rows.
        """
        if settings.data.validation_fraction is not None:
            return self._validated(settings, base, saved_partition)
        data = settings.data
        rows, encoded, read = self._encoded(settings, base, data.path, data.split, data.max_rows)
        chosen, held = divided(settings, rows)
        training, tokens = rows.select(chosen), encoded.tokens.select(chosen)
        held_rows, held_tokens = (None, None) if held is None else (rows.select(held), encoded.tokens.select(held))
        held_counts = None
        if data.eval_path is not None:
            held_rows, evaluated, _ = self._encoded(settings, base, data.eval_path, Split.TEST, None)
            held_tokens, held_counts = evaluated.tokens, evaluated.counts
        left_out = emptied(settings, read, training)
        if left_out and saved_partition is None:
            settings = without_emptied(settings, training, left_out, encoded.counts.told)
            self.progress.note(f"left out, since none of its rows is usable: client {', '.join(left_out)}")
        data_sha256 = tokens.sha256()
        whole = partition_of(settings, training, tokens, data_sha256, saved_partition)
        training, tokens, partition, own = own_rows(settings, training, tokens, whole)
        tokens, partition, canaries = plant(tokens, partition, planting_of(data), base.tokenizer, settings.run.seed)
        return Inputs(
            training,
            tokens,
            partition,
            held_rows,
            held_tokens,
            encoded.counts,
            held_counts,
            data_sha256,
            None if held_tokens is None else held_tokens.sha256(),
            left_out,
            whole,
            own,
            canaries,
        )

    def _validated(self, settings: Settings, base: Base, saved_partition: Path | None) -> Inputs:
        """Return the training rows divided into those that stay and those that the run is measured on.

        The clients are those of a run without validation rows; a file of held-out rows is not opened.
        """
        data, seed = settings.data, settings.run.seed
        scored = [self.inputs(unvalidated(settings, one), base).held_out for one in data.scored_seeds]
        whole, rng = self.inputs(unvalidated(settings, seed), base), stream(seed, "validation")
        split, partition = set_aside(
            whole.rows, whole.tokens, whole.partition, scored, data.validation_fraction or 0.0, rng
        )
        tokens, held_tokens = whole.tokens.select(split.kept), whole.tokens.select(split.held)
        if saved_partition is not None:
            partition = Partition.load(saved_partition, tokens.sha256())
        planted, owners, canaries = plant(tokens, partition, planting_of(data), base.tokenizer, seed)
        return replace(
            whole,
            rows=whole.rows.select(split.kept),
            tokens=planted,
            partition=owners,
            canaries=canaries,
            whole=partition,
            held_out_rows=whole.rows.select(split.held),
            held_out=held_tokens,
            held_out_counts=None,
            data_sha256=tokens.sha256(),
            held_out_sha256=held_tokens.sha256(),
        )

    def read(self, settings: Settings, name: str, split: str, max_rows: int | None) -> Rows:
        """Return the rows of the data ``name``, which have the columns they need; ``max_rows`` are drawn by the seed.

        Those to train on are put together by ``data.unit_column``.

        Raises:
            DataError: if they cannot be read, or lack a column.
        """
        data, key = settings.data, _reading(settings, name, split, max_rows)
        if key not in self._read:
            self.progress.note(f"reading {'held-out ' if split == Split.TEST else ''}rows of {name}")
            rows = load_rows(name, split, subset=data.subset, revision=data.revision)
            if max_rows is not None and max_rows < len(rows):
                drawn = stream(settings.run.seed, "max_rows").permutation(len(rows))[:max_rows]
                rows = rows.select(np.sort(drawn))
            if (name, split) == (data.path, data.split):
                rows = by_unit(rows, data.unit_column, natural_owners(settings, rows))
            self._records[key] = read_records(rows, data.shape, data.columns)
            self._read[key] = rows
        return self._read[key]

    def held_out(self, settings: Settings, base: Base) -> tuple[Rows, Encoded] | None:
        """Return the rows of ``data.eval_path`` alone, where there are any: a server has no others.

        Raises:
            DataError: if rows cannot be read or used.
        """
        name = settings.data.eval_path
        return None if name is None else self._encoded(settings, base, name, Split.TEST, None)[:2]

    def base_scores(
        self, settings: Settings, rows: Sequence[str | None], score: Callable[[], dict[str, Any]], anew: bool = False
    ) -> dict[str, Any]:
        """Return what ``score`` gives of the untouched base, once for the same rows unless ``anew``.

        ``rows`` are the hashes of those that are scored. Suites draw their intervals by the run's seed.
        """
        parts = [part.model_dump_json() for part in (settings.model, settings.data)]
        parts.append(settings.evaluation.model_dump_json(exclude={"every"}))
        seed = settings.run.seed if settings.evaluation.suites else None
        key = " ".join([*parts, str(seed), str(rows)])
        if anew or key not in self._base_scores:
            self._base_scores[key] = score()
        return self._base_scores[key]

    def _encoded(
        self, settings: Settings, base: Base, name: str, split: str, max_rows: int | None
    ) -> tuple[Rows, Encoded, Rows]:
        """Return the usable rows of the data ``name`` with their tokens, in step, and all that were read.

        ``max_rows`` are drawn by the seed.
        """
        data = settings.data
        reading = _reading(settings, name, split, max_rows)
        key = f"{reading} {data.date} {base.revision_hash} {settings.model.tokenizer}"
        if key not in self._rows:
            rows = self.read(settings, name, split, max_rows)
            records = self._records.pop(reading, None) or read_records(rows, data.shape, data.columns)
            if len(rows) >= MANY_ROWS:
                self.progress.note(f"making tokens of {len(rows):,} rows")
            encoded = encode_records(records, data, base, cache=self.cache)
            if encoded.counts.told:
                self.progress.note(encoded.counts.told)
            self._rows[key] = rows.select(encoded.kept), encoded, rows
        return self._rows[key]


def planting_of(data: Data) -> Planting:
    """Return which canaries the settings plant."""
    return Planting(data.canaries, data.canary_clients, data.canary_repetitions)


def _reading(settings: Settings, name: str, split: str, max_rows: int | None) -> str:
    """Return what decides which rows are read, and how."""
    drawn = "" if max_rows is None else f" {settings.run.seed}"
    owners = "" if settings.data.unit_column is None else f" {settings.partition.scheme} {settings.partition.column}"
    return f"{name} {split} {settings.data.model_dump_json(exclude=_OF_ANY_READING)}{drawn}{owners}"


def lora_of(model: Any, patterns: Sequence[str] | None, part: Any = None) -> LoRAModel:
    """Wrap the modules that the patterns choose, or those of them that a ``part`` of the model holds.

    What ``all-linear`` chooses may be narrower than a rank.
    """
    targets = resolve_targets(model, patterns)
    if part is not None:
        held = {name for name, _ in part.named_modules(remove_duplicate=False)}
        targets = [name for name in targets if name in held]
    narrow = targets if patterns is not None and ALL_LINEAR in patterns else ()
    return LoRAModel(model if part is None else part, targets, narrow)


def encode_rows(
    rows: Rows, data: Data, base: Base, *, named: Callable[[str], str] = "data.{}".format
) -> tuple[Rows, Encoded]:
    """Return the usable rows and their tokens, read as ``data`` says; ``named`` gives the user's name of a setting.

    Raises:
        DataError: rows cannot be read or used.
    """
    encoded = encode_records(read_records(rows, data.shape, data.columns), data, base, named=named)
    return rows.select(encoded.kept), encoded


def encode_records(
    records: Records,
    data: Data,
    base: Base,
    *,
    named: Callable[[str], str] = "data.{}".format,
    cache: TokenCache | None = None,
) -> Encoded:
    """Return the tokens of the usable ones of records; arguments are those of :func:`encode_rows`, and a ``cache``.

    Raises:
        DataError: rows cannot be used.
    """
    how = {
        "template": data.template or AUTO,
        "date": data.day,
        "max_length": longest_row(data.max_length, base.model.config, named),
        "at_most": context_of(base.model.config),
        "loss_on": data.loss_on,
        "overlong": data.overlong,
        "unanswered": data.unanswered,
    }
    cache = cache or TokenCache(None)
    key = cache.key(records, base.tokenizer, how)
    if (kept := cache.read(key, records, base.tokenizer)) is not None:
        return kept
    encoded = encode(records, base.tokenizer, **how, named=named)  # type: ignore[arg-type]
    cache.write(key, encoded)
    return encoded
