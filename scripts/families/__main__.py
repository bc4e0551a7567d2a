"""Try every kind of decoder that the installed transformers knows, and write docs/families.md.

python scripts/families                          # all kinds: ten minutes on two cores
python scripts/families --resume                 # go on where the last one was stopped
python scripts/families --only llama,mixtral     # print the lines of some
python scripts/families --check --sample 20      # compare a seeded twenty with the page; exit 1 where they differ
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from children import try_kinds
from page import PAGE, line_of, lines_by_kind, page, reasons_of, versions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trial import Findings

from fedloom.seeding import stream

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
KEPT = Path(__file__).resolve().parents[2] / "build" / "families.json"


def main(arguments: list[str]) -> int:
    """Write the page, print some of its lines, or compare them with it."""
    parser = argparse.ArgumentParser(description="Try every kind of decoder that the installed transformers knows.")
    parser.add_argument("--resume", action="store_true", help="keep what the last command found")
    parser.add_argument("--only", metavar="KINDS", help="these kinds, with commas between them")
    parser.add_argument("--sample", metavar="N", type=int, help="so many kinds, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare with the page; exit 1 where it differs")
    parser.add_argument("--page", metavar="FILE", type=Path, default=PAGE)
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    kinds = given.only.split(",") if given.only else chosen(given.sample, given.seed) if given.sample else None
    if kinds is None and not given.check:
        return write(given.page, given.resume, given.workers)
    found = try_kinds(kinds or KINDS, given.workers, told).values()
    if given.check:
        return compare(found, lines_by_kind(given.page.read_text(encoding="utf-8")))
    print("\n".join(line for one in found for line in lines_of(one)))
    return 0


def chosen(count: int, seed: int) -> list[str]:
    """Return a seeded choice of kinds."""
    return sorted(stream(seed, "kinds of decoders").choice(KINDS, size=count, replace=False).tolist())


def write(file: Path, resumes: bool, workers: int) -> int:
    """Try all kinds and write the page; what is found is kept at once."""
    found = kept() if resumes else {}

    def keep(one: Findings) -> None:
        found[one.kind] = one
        told(one, len(found))
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps({"versions": versions(), "found": [asdict(each) for each in found.values()]}))

    try_kinds([kind for kind in KINDS if kind not in found], workers, lambda one, _: keep(one))
    file.write_text(page(found), encoding="utf-8")
    return report([f"{one.kind}: {text}" for one in found.values() for text in one.wrong], f"{file.name} is written")


def kept() -> dict[str, Findings]:
    """Return what the last command found with these versions."""
    if not KEPT.is_file():
        return {}
    told_then = json.loads(KEPT.read_text())
    return {one["kind"]: Findings(**one) for one in told_then["found"]} if told_then["versions"] == versions() else {}


def told(one: Findings, num_done: int) -> None:
    """Show progress."""
    print(f"{num_done:>3}  {line_of(one)} {'; '.join(one.wrong)}", file=sys.stderr, flush=True)


def compare(found: Iterable[Findings], committed: dict[str, list[str]]) -> int:
    """Compare what is found of some kinds with the lines of a page."""
    wrong = []
    for one in found:
        wrong += [f"{one.kind}: {text}" for text in one.wrong]
        if lines_of(one) != committed.get(one.kind, []):
            wrong.append(f"{one.kind}: the page says {committed.get(one.kind, [])}, found {lines_of(one)}")
    return report(wrong, "the page says what is found")


def lines_of(one: Findings) -> list[str]:
    """Return the lines of a kind on the page."""
    return [line_of(one)] * one.is_built + list(reasons_of(one))


def report(wrong: Sequence[str], otherwise: str) -> int:
    """Print what is wrong, or that nothing is; return the exit status."""
    print("\n".join(wrong or [otherwise]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
