"""An explanation as tables of text: rounds, modules, factors and moments, ranks and scales, and the reading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.explanation.facts import ModuleFacts
from fedloom.explanation.moments import FactorMoments
from fedloom.explanation.reading import EXACT, reading
from fedloom.wording import counted

if TYPE_CHECKING:
    from fedloom.explanation.explain import Explanation

WIDTH, MAX_NAME = 116, 44
MAX_MODULES, MAX_ROUNDS, MAX_VALUES = 12, 12, 16
HALF = 5
"""Modules shown from either end where there are more than fit."""
MODULE_HEAD = ("module", "rank", "used", "effective", "stable", "norm", "change", "agreement", "cosine", "noise")
ROUND_HEAD = ("round", "loss", "rank", "effective", "change", "agreement", "cosine", "noise")


def lines(found: Explanation) -> list[str]:
    """Return the explanation for people."""
    shown = chosen(found.modules)
    head = f"{found.path}: {found.method}, round {found.round} of {found.num_rounds}"
    left = len(found.modules) - len(shown)
    told = [f"{head}, {counted(found.num_clients, 'client')}"]
    told += _rounds(found)
    told += _table(MODULE_HEAD, map(module_row, shown))
    if left:
        told.append(f"the {HALF} modules that agree least and most are shown, {left} are not: --module NAME, or --json")
    told += _factors(found, shown)
    told += _spectrum(shown)
    told += _scales(found)
    return [*told, *reading(found), *found.notes, *(f"not kept: {one}" for one in found.missing)]


def chosen(modules: Sequence[ModuleFacts], most: int = MAX_MODULES, half: int = HALF) -> list[ModuleFacts]:
    """Return all modules, or where there are more than ``most``, ``half`` from either end.

    They are ranked by the cosine of the clients, or by effective rank where none is known.
    """
    if len(modules) <= most:
        return list(modules)
    ranked = sorted(range(len(modules)), key=lambda k: (_worth(modules[k]), k))
    kept = {*ranked[:half], *ranked[-half:]}
    return [one for k, one in enumerate(modules) if k in kept]


def _worth(one: ModuleFacts) -> float:
    if one.cosine is not None:
        return one.cosine
    return one.shape.effective_rank if one.shape is not None else 0.0


def module_row(one: ModuleFacts) -> list[str]:
    """Return a module's cells under ``MODULE_HEAD``."""
    shape = one.shape
    made = (
        ["–"] * 5
        if shape is None
        else [
            f"{shape.rank:.0f}",
            f"{shape.numerical_rank:.0f}",
            f"{shape.effective_rank:.1f}",
            f"{shape.stable_rank:.1f}",
            _number(shape.norm),
        ]
    )
    return [
        one.module,
        *made,
        _number(one.change_norm),
        _share(one.agreement),
        _share(one.cosine),
        _noise(one.aggregation_noise),
    ]


def _rounds(found: Explanation) -> list[str]:
    """Return a line per round: of many the first, the last, and some between."""
    every = found.rounds
    if len(every) < 2:
        return []
    steps = {round(k * (len(every) - 1) / (MAX_ROUNDS - 1)) for k in range(MAX_ROUNDS)}
    rows = [
        [
            str(one.round),
            _share(one.loss_nats, 3),
            _share(one.rank, 0),
            _share(one.effective_rank, 1),
            _number(one.change_norm),
            _share(one.agreement),
            _share(one.cosine),
            _noise(one.aggregation_noise),
        ]
        for k, one in enumerate(every)
        if len(every) <= MAX_ROUNDS or k in steps or one.round == found.round
    ]
    return _table(ROUND_HEAD, rows)


def _factors(found: Explanation, shown: Sequence[ModuleFacts]) -> list[str]:
    if not any(one.moments for one in shown):
        return []
    head = ("module", "‖A‖", "s‖B‖", "gradient of A", "of B", "step of A", "of B")
    rows = []
    for one in shown:
        norms = ["–", "–"] if one.shape is None else [_number(one.shape.a_norm), _number(one.shape.b_norm)]
        a, b = (one.moments.get(factor, FactorMoments(0.0, None)) for factor in "ab")
        rows.append([one.module, *norms, _number(a.gradient), _number(b.gradient), _share(a.step), _share(b.step)])
    return _table(head, rows, f"factors and moments ({found.moments}); steps in learning rates")


def _spectrum(shown: Sequence[ModuleFacts]) -> list[str]:
    """Return the singular values where one module is asked for."""
    if len(shown) != 1 or shown[0].shape is None or not shown[0].shape.singular_values:
        return []
    values = shown[0].shape.singular_values
    more = f", and {len(values) - MAX_VALUES} more" if len(values) > MAX_VALUES else ""
    return [f"singular values: {' '.join(_number(value) for value in values[:MAX_VALUES])}{more}"]


def _scales(found: Explanation) -> list[str]:
    if not found.scales:
        return []
    rows = [
        [str(one.rank), f"{one.alpha:.4g}", f"{one.scale:.4g}", str(one.num_clients), _number(one.client_norm)]
        for one in found.scales
    ]
    what = "gradient" if found.compared.startswith("gradient") else "change"
    return _table(("rank", "alpha", "scale", "clients", f"norm of a client's {what}"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> list[str]:
    table = Table(title=title or None, title_justify="left")
    rows = list(rows)
    longest = min(MAX_NAME, max((len(row[0]) for row in rows), default=0))
    for k, name in enumerate(head):
        justify: Literal["left", "right"] = "left" if k == 0 else "right"
        table.add_column(name, justify=justify, overflow="fold", min_width=longest if k == 0 else None)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().rstrip().splitlines()]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _noise(value: float | None) -> str:
    return "–" if value is None else "0" if value < EXACT else f"{value:.2g}"


def _share(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
