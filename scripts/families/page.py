"""The page of the families: what was found of each kind, as lines that a test can compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from trial import NOT, Findings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"

_INTRODUCTION = """\
# Families of decoders

Written by `make families` (`scripts/families/`) with {versions}.

Each kind that this version of transformers lists as a causal language model was built tiny, of random weights, and
tried on a CPU. Your own base is checked the same way when a run begins, so a kind that is not listed may work too.

* **trains**: `packed` (rows without padding) or `padded` (`model.attention = "padded"`, slower); loss and gradients of
  a step equal those of stock peft, row by row. `no`: a run refuses it in one line.
* **adapted**: the layers that LoRA adapts by default, found in the model or, where it says so, named in the table of
  [your own model](model.md#families). `no`: name them, or use `"all-linear"`.
* **cut**: where split training, which runs on packed rows, can cut it: each part, loaded alone, gives the outputs of
  the whole model.
* **peft**: adapters on the default layers and on every linear layer, exported and loaded by stock peft, give our
  logits: `equal`; `named`: export names the layers that stock peft does not load.
* **merged**: the model that `export --merge` writes gives the same logits as adapter and base. `no`: it is refused.

{counts}

| kind | trains | adapted | cut | peft | merged |
|---|---|---|---|---|---|
"""
_REASONS = """
## What does not work, and why

| kind | what | reason |
|---|---|---|
"""


def versions() -> str:
    """Return the versions that the findings hold for."""
    return ", ".join(f"{package} {version(package)}" for package in ("transformers", "peft"))


def page(found: Mapping[str, Findings]) -> str:
    """Return docs/families.md."""
    kinds = [found[kind] for kind in sorted(found)]
    rows = [line_of(one) for one in kinds if one.is_built]
    reasons = [line for one in kinds for line in reasons_of(one)]
    introduction = _INTRODUCTION.format(versions=versions(), counts=counts_of(kinds))
    return introduction + "\n".join(rows) + "\n" + _REASONS + "\n".join(reasons) + "\n"


def counts_of(kinds: Iterable[Findings]) -> str:
    """Return the counts in sentences."""
    all_kinds = list(kinds)
    built = [one for one in all_kinds if one.is_built]
    trains = {way: sum(one.trains == way for one in built) for way in ("packed", "padded", NOT)}
    ways = f"{trains['packed']} train packed" + (f", {trains['padded']} padded" if trains["padded"] else "")
    num_cut, equal, named = (
        sum(test(one) for one in built)
        for test in (lambda one: one.cut != NOT, lambda one: one.peft == "equal", lambda one: one.peft == "named")
    )
    return (
        f"Of {len(all_kinds)} kinds {len(built)} can be built here: {ways}, {trains[NOT]} do not train;\n"
        f"{num_cut} can be cut. Adapters of {equal} load in stock peft as they are; of {named} some layers\n"
        "do not, and are named."
    )


def line_of(one: Findings) -> str:
    """Return a kind's line in the table."""
    adapted = f"{one.adapted} (table)" if one.is_in_table else one.adapted
    return f"| `{one.kind}` | {one.trains} | {adapted} | {one.cut} | {one.peft} | {one.merged} |"


def reasons_of(one: Findings) -> Iterator[str]:
    """Yield a line for each thing that does not work."""
    failed = {
        "built": not one.is_built,
        "trains": one.trains == NOT,
        "cut": one.cut == NOT,
        "merged": one.merged == NOT,
    }
    for what, has_failed in failed.items():
        if has_failed and what in one.reasons:
            yield f"| `{one.kind}` | {what} | {one.reasons[what]} |"


def lines_by_kind(text: str) -> dict[str, list[str]]:
    """Return the lines of each kind on a page."""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            lines.setdefault(line.split("`")[1], []).append(line)
    return lines
