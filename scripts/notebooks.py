"""Write one notebook per method into examples/notebooks: python scripts/notebooks.py

They run offline in seconds, on the embedded model and rows. A test compares them with what this writes, and runs them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedloom.methods import table

TO = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
PAGES = {"centralised": "controls", "standalone": "controls", "base": "controls"}
SETTINGS = {
    "data": {"template": "plain", "eval_rows": 100},
    "partition": {"scheme": "category", "column": "category", "categories_per_client": 4},
    "federation": {"num_clients": 4, "num_rounds": 2},
    "training": {"local_steps": 5, "batch_size": 8, "learning_rate": 1e-2},
}
RANKS = [16, 8, 4, 4]


def cells(method: str) -> list[tuple[str, str]]:
    """Return kind and text of every cell."""
    traits = table.traits_of(method)
    ranks: Any = 8 if traits.needs_one_rank or traits.is_cut or traits.pools_rows else RANKS
    chosen = {**SETTINGS, "method": {"name": method} | ({"ranks": ranks} if traits.is_trained else {})}
    if not traits.is_trained:
        del chosen["training"]
        chosen["federation"] = {"num_clients": 4}
    if traits.is_cut:
        chosen["split"] = {"cut_layer": 2, "aggregate_every": 5}
    written = "\n".join(f'    "{name}": {json.dumps(values)},' for name, values in chosen.items())
    page = PAGES.get(method, method)
    found = [
        (
            "markdown",
            f"# {method}\n\n{traits.title[0].upper()}{traits.title[1:]}. Its page: "
            f"[docs/methods/{page}.md](../../docs/methods/{page}.md). Everything here runs offline, in seconds.",
        ),
        ("markdown", "Settings are tables, as in a recipe; what is not given has its default. All mistakes are named."),
        ("code", f"import fedloom\n\nsettings = fedloom.load_settings({{\n{written}\n}})"),
        ("markdown", "What it would train, send and hold, before anything is trained:"),
        ("code", "fedloom.describe(settings)"),
        ("markdown", "Train. The same cell again resumes: a finished run is read and not run again."),
        ("code", f'result = fedloom.run(settings, "runs/notebook-{method}")\nresult'),
    ]
    if traits.is_trained:
        found += [
            ("markdown", "Below 0: better than the base on the held-out rows, in nats per token."),
            ("code", 'result.eval["loss_nats"] - result.base_eval["loss_nats"]'),
        ]
    if traits.is_trained and not traits.is_personal and method != "standalone":
        asked = 'fedloom.generate(fedloom.open_result(result.folder), "Translate into Kelu: green bird")'
        found += [("markdown", "Ask the result something:"), ("code", asked)]
    return found


def notebook(method: str) -> dict[str, Any]:
    """Return the notebook in nbformat 4.5, without outputs."""
    written = []
    for number, (kind, text) in enumerate(cells(method)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"{method}-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        written.append({**cell, "source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text_of(method: str) -> str:
    """Return the file of a method's notebook."""
    return json.dumps(notebook(method), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    TO.mkdir(exist_ok=True)
    for method in table.shipped():
        (TO / f"{method}.ipynb").write_text(text_of(method), encoding="utf-8")


if __name__ == "__main__":
    main()
