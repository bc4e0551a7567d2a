"""An explanation as one page of HTML: the reading, plots over rounds and of spectra, and the tables behind them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from fedloom.explanation.explain import Explanation
from fedloom.explanation.facts import ModuleFacts, RoundFacts
from fedloom.explanation.reading import reading
from fedloom.explanation.tables import MODULE_HEAD, chosen, module_row
from fedloom.reporting.charts import NUM_COLOURS, Axis, Line, line_chart
from fedloom.reporting.page.document import page, scheme_button
from fedloom.reporting.page.parts import figure, section, table
from fedloom.reporting.spectra import NOTHING
from fedloom.reporting.svg import element

TITLE = "fedloom explain"
_ROUND = Axis("round", whole=True)
_OF_ROUNDS: tuple[tuple[str, str, Callable[[RoundFacts], float | None]], ...] = (
    ("Agreement of the clients", "share of their work left in the mean", lambda one: one.agreement),
    ("Cosine of two clients", "mean cosine", lambda one: one.cosine),
    ("Effective rank", "mean over modules", lambda one: one.effective_rank),
    ("Change of a round", "norm", lambda one: one.change_norm),
)
_OF_MODULES = (
    ("agreement", "Agreement by module", "share of the clients' work left in the mean"),
    ("cosine", "Cosine by module", "mean cosine of two clients"),
    ("change_norm", "Change by module", "norm of the round's change"),
    ("aggregation_noise", "Noise by module", "share of the clients' mean"),
    ("effective_rank", "Effective rank by module", "directions"),
)


def html_of(found: Explanation) -> str:
    """Return the page."""
    head = element("div", element("h1", text=f"{found.method}, explained"), scheme_button())
    about = element("p", text=f"{found.path.name}, round {found.round} of {found.num_rounds}", class_="lead")
    told = element("ul", *(element("li", text=line) for line in reading(found)))
    left = [*found.notes, *(f"not kept: {one}" for one in found.missing)]
    warnings = [element("p", text=line, class_="note") for line in left]
    shown = chosen(found.modules, NUM_COLOURS, NUM_COLOURS // 2)
    body = "".join(
        (
            element("header", head, about),
            section("reading", "In words", "", told, *warnings),
            section("rounds", "Rounds", "", *(_of_rounds(found, *one) for one in _OF_ROUNDS)),
            section(
                "modules", "Modules", "", _spectra(shown), *(_of_modules(found, shown, *one) for one in _OF_MODULES)
            ),
            section(
                "figures", f"Round {found.round}", "", table(MODULE_HEAD, [module_row(one) for one in found.modules])
            ),
        )
    )
    return page(f"{TITLE}: {found.path.name}", element("main", body))


def _of_rounds(found: Explanation, title: str, axis: str, value_of: Callable[[RoundFacts], float | None]) -> str:
    points = [(one.round, value) for one in found.rounds if (value := value_of(one)) is not None]
    return _figure(title, Axis(axis), [(found.method, points)])


def _of_modules(found: Explanation, shown: Sequence[ModuleFacts], key: str, title: str, axis: str) -> str:
    rounds, labels = [one.round for one in found.rounds], short_names([one.module for one in shown])
    curves = []
    for one in shown:
        values = found.history.get(one.module, {}).get(key, (None,) * len(rounds))
        curves.append((labels[one.module], [(n, v) for n, v in zip(rounds, values, strict=True) if v is not None]))
    return _figure(title, Axis(axis), curves)


def _spectra(shown: Sequence[ModuleFacts]) -> str:
    labels, curves = short_names([one.module for one in shown]), []
    for one in shown:
        values = one.shape.singular_values if one.shape is not None else ()
        kept = [value for value in values if value > NOTHING * values[0]]
        curves.append((labels[one.module], [(k, value) for k, value in enumerate(kept, start=1)]))
    return _figure(
        "Spectrum of the global adapter", Axis("singular value", kind="log"), curves, Axis("direction", whole=True)
    )


def _figure(title: str, y: Axis, curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], x: Axis = _ROUND) -> str:
    """Return a chart of the curves that have two points or more, and their numbers."""
    drawn = [(label, points) for label, points in curves if len(points) > 1]
    if not drawn:
        return ""
    lines = [
        Line(label, k % NUM_COLOURS, [float(at) for at, _ in points], [value for _, value in points])
        for k, (label, points) in enumerate(drawn)
    ]
    numbers = table(
        ("", x.title, y.title), [[label, str(at), f"{value:.4g}"] for label, points in drawn for at, value in points]
    )
    return figure(title, line_chart(title, x, y, lines), "", numbers)


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Return a label of every module that tells it from the others: number and last part, or all of it."""
    labels = {name: ".".join([*re.findall(r"\d+", name)[:1], name.rpartition(".")[2]]) for name in modules}
    shared = {label for label, times in Counter(labels.values()).items() if times > 1}
    return {name: name if label in shared else label for name, label in labels.items()}
