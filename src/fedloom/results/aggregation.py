"""Merge adapter folders of several sites into one: the weighted mean of their products, exactly, then at any rank.

    b a = Σ_k p_k s_k b_k a_k,   p_k = weight_k / Σ weights

A module that one site did not adapt counts there as zero. The folders may be strangers': they are checked as every
foreign adapter is, and must be for one base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedloom.errors import AdapterError
from fedloom.file_formats import SOURCES
from fedloom.lora.algebra import covering, distance, norm, norm_of_pair
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import WEIGHTS_NAME, parameters_of, save_peft
from fedloom.lora.peft_settings import CONFIG_NAME
from fedloom.methods.combination import aggregate, shares_of
from fedloom.methods.side import compacted
from fedloom.models.base_folder import fetched
from fedloom.names import looks_like_hub_name
from fedloom.results.card import adapter_card
from fedloom.results.chosen_round import RESULT
from fedloom.results.exported import (
    CARD,
    Exported,
    at_rank,
    chosen_result,
    dtype_named,
    is_conv1d,
    only_adapter,
    own_folder,
    publish,
    refuse_files,
)
from fedloom.results.opened_result import Found
from fedloom.results.peft_check import check_with_peft
from fedloom.results.serving_files import copy_agreed_serving_files
from fedloom.run_folder import durable
from fedloom.wording import Displayed, one_line

SOURCES_FILE = "sources.json"
_ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)


@dataclass(frozen=True)
class Source:
    """One of the adapters that were merged.

    Attributes:
        name: that of its folder, or on the hub; never its place on this machine.
        weight: its share; the shares of all sum to one.
        ranks: by module.
        sha256: of each of its files.
        norm: Frobenius norm of what it adds.
    """

    name: str
    weight: float
    ranks: Mapping[str, int]
    sha256: Mapping[str, str]
    norm: float

    def line(self) -> str:
        """Return the source in one line."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        digest = self.sha256[WEIGHTS_NAME][:12]
        return f"{one_line(self.name)}: weight {self.weight:.4g}, {len(self.ranks)} modules of {ranks}, sha256 {digest}"


@dataclass(frozen=True)
class Aggregated(Displayed):
    """What was written, from what, and what each module lost.

    Attributes:
        exported: the adapter's folder, ranks and errors over all modules.
        norms: Frobenius norm of the exact mean, by module.
        rank_errors: Frobenius distance of the written product from it, by module, before the cast.
    """

    exported: Exported
    sources: tuple[Source, ...]
    norms: Mapping[str, float]
    rank_errors: Mapping[str, float]

    def relative_errors(self) -> dict[str, float]:
        """Return what the rank drops of every module, as a share of the module's norm."""
        return {name: error / self.norms[name] if error else 0.0 for name, error in self.rank_errors.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **self.exported.as_dict(),
            "sources": [source.__dict__ | {"ranks": dict(source.ranks)} for source in self.sources],
            "relative_rank_error_of_module": self.relative_errors(),
        }

    def lines(self) -> list[str]:
        """Return what was written, what it lost, and from what."""
        lines = self.exported.lines()
        if self.exported.rank_error > 0.0:
            by_share = sorted(self.relative_errors().items(), key=lambda item: item[1])
            (least_of, least), (most_of, most) = by_share[0], by_share[-1]
            lines.insert(
                2, f"by module it drops {least:.3%} ({least_of}) to {most:.3%} ({most_of}); {SOURCES_FILE} lists all"
            )
        return [*lines, *(source.line() for source in self.sources), *self.remarks()]

    def remarks(self) -> list[str]:
        """Return what is seldom meant: the same numbers from two sources, and a source that adds nothing."""
        seen: dict[str, str] = {}
        found = []
        for source in self.sources:
            earlier = seen.get(source.sha256[WEIGHTS_NAME])
            seen[source.sha256[WEIGHTS_NAME]] = source.name
            if earlier is not None:
                found.append(f"{one_line(source.name)} holds the same weights as {one_line(earlier)}: they count twice")
            if source.norm == 0.0:
                found.append(f"{one_line(source.name)} adds nothing (all of its products are zero): was it trained?")
        return found


def aggregate_adapters(
    sources: Sequence[str | Path],
    to: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: str | Path | None = None,
    dtype: str = "float32",
) -> Aggregated:
    """Write the weighted mean of several adapters as one PEFT adapter, with its card and its sources' hashes.

    ``sources`` are PEFT folders, names on the hub, or finished runs. Their products are stacked, so the mean is exact
    whatever the ranks and scales; with ``rank`` every module gets that rank, as :func:`export_adapter` gives it.
    ``weights`` are divided by their sum; by default they are equal. ``base`` names the base where the adapters' own
    files do not name one and the same.

    Raises:
        AdapterError: there are fewer than two, one is corrupt, is given twice, weights do not fit, shapes differ, the
            bases are not the same, or the rank is none of the result's.
        RunError: one is neither an adapter nor a finished run, or ``to`` holds files.
        ModelError: a name is not on the hub.
    """
    to = Path(to)
    refuse_files(to)
    if len(sources) < 2:
        raise AdapterError(
            f"expected two adapters or more to aggregate, got {len(sources)}; give more, or use fedloom export for one"
        )
    shares = shares_of(len(sources), weights)
    found = [chosen_result(_folder(source), None) for source in sources]
    _refuse_twice(found)
    adapters = [only_adapter(one) for one in found]
    _refuse_other_shapes(found, adapters)
    reference = _agreed_base(found, None if base is None else str(base))
    exact = compacted(aggregate(covering(adapters), shares))
    kept, errors = at_rank(exact, rank)
    cast = kept.to(dtype_named(dtype))
    cast_error = 0.0 if dtype == "float32" else distance(kept, cast.to(torch.float32))
    exported = Exported(to, "adapter", dtype, cast.ranks, norm(exact), math.hypot(*errors.values()), cast_error)
    norms = {name: norm_of_pair(pair) for name, pair in exact.items()}
    result = Aggregated(exported, _described(sources, found, shares), norms, errors)
    folders = [own_folder(one) for one in found]
    place = found[0].base_name if base is None else str(base)
    here = Found(to, {RESULT: exact}, place, reference=reference)

    def write(folder: Path) -> None:
        nonlocal result
        save_peft(
            cast,
            folder,
            base_name=reference,
            conv1d=any(map(is_conv1d, folders)),
            parameters=frozenset().union(*map(parameters_of, folders)),
        )
        unread, unchecked = check_with_peft(here, folder, None)
        copy_agreed_serving_files(folders, folder)
        result = replace(result, exported=replace(exported, unread=unread))
        card = adapter_card(here, result.lines(), result.exported.is_exact)
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / SOURCES_FILE).write_bytes(durable.json_bytes(_record(result, rank)))
        result = replace(result, exported=replace(result.exported, unchecked=unchecked))

    publish(to, write)
    return result


def _folder(source: str | Path) -> Path:
    """Return the folder of a source, fetched where it is a name on the hub."""
    folder = Path(source).expanduser()
    if folder.exists() or not looks_like_hub_name(str(source)):
        return folder
    return fetched(str(source), None, "adapter", list(_ADAPTER_FILES))


def _refuse_twice(found: Sequence[Found]) -> None:
    places = [one.path.resolve() for one in found]
    for position, place in enumerate(places):
        if place in places[:position]:
            raise AdapterError(f"{found[position].path}: expected each adapter once, got it twice; give it a weight")


def _refuse_other_shapes(found: Sequence[Found], adapters: Sequence[Adapter]) -> None:
    first: dict[str, tuple[tuple[int, int], Path]] = {}
    for one, adapter in zip(found, adapters, strict=True):
        for name, shape in adapter.shapes.items():
            expected, holder = first.setdefault(name, (shape, one.path))
            if shape != expected:
                raise AdapterError(
                    f"{one.path}: expected {name} with {expected[0]} outputs and {expected[1]} inputs, as in {holder}, "
                    f"got {shape[0]} and {shape[1]}; they are for different bases, or one is damaged: leave one out"
                )


def _agreed_base(found: Sequence[Found], base: str | None) -> BaseReference:
    """Return the base that all adapters are for: of one hash where they hold one, of one name where they do not.

    Raises:
        AdapterError: they are for different bases, or one names none and ``base`` is not given.
    """
    hashed = [one for one in found if one.reference is not None and one.reference.sha256 is not None]
    for one in hashed[1:]:
        if _sha256(one) != _sha256(hashed[0]):
            raise AdapterError(
                f"expected adapters of one base, got sha256 {_sha256(hashed[0])[:12]} in {hashed[0].path} and "
                f"{_sha256(one)[:12]} in {one.path}; leave one out"
            )
    sha256 = _sha256(hashed[0]) if hashed else None
    if base is not None:
        return BaseReference.of(base, sha256)
    for one in found:
        if one.reference is None or not one.reference.name:
            raise AdapterError(
                f"{one.path}: expected an adapter that names its base, got none; give it with --base NAME"
            )
        first = found[0].reference
        assert first is not None
        if one.reference.name != first.name and len(hashed) < len(found):
            raise AdapterError(
                f"expected adapters of one base, got {first.name!r} in {found[0].path} and {one.reference.name!r} in "
                f"{one.path}; if it is the same, name it with --base, else leave one out"
            )
    named = hashed[0].reference if hashed else found[0].reference
    assert named is not None
    return named


def _sha256(found: Found) -> str:
    return str(found.reference.sha256) if found.reference is not None else ""


def _described(sources: Sequence[str | Path], found: Sequence[Found], shares: Sequence[float]) -> tuple[Source, ...]:
    described = []
    for one, share, name in zip(found, shares, _names(sources, found), strict=True):
        folder = own_folder(one)
        digests = {file: durable.file_sha256(folder / file) for file in _ADAPTER_FILES}
        adapter = only_adapter(one)
        described.append(Source(name, share, adapter.ranks, digests, norm(adapter)))
    return tuple(described)


def _names(sources: Sequence[str | Path], found: Sequence[Found]) -> list[str]:
    """Return the folders' own names, with that of the folder above where two are the same."""
    places = [one.path.resolve() for one in found]
    short = [place.name for place in places]
    names = []
    for source, place in zip(sources, places, strict=True):
        is_folder, is_alone = Path(source).expanduser().exists(), short.count(place.name) == 1
        names.append((place.name if is_alone else f"{place.parent.name}/{place.name}") if is_folder else str(source))
    return names


def _record(result: Aggregated, rank: int | None) -> dict[str, Any]:
    """Return what stands beside the weights: sources, shares, and what the rank cost."""
    return {
        "format": "fedloom-sources",
        "format_version": SOURCES.number,
        "sources": [{"name": one.name, "weight": one.weight, "sha256": dict(one.sha256)} for one in result.sources],
        "rank": rank,
        "relative_rank_error": result.exported.share(result.exported.rank_error),
        "relative_rank_error_of_module": result.relative_errors(),
    }
