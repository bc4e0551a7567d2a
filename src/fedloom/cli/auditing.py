"""audit: which laws of aggregation a method or a function keeps, and by how much it misses the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import JsonOption
from fedloom.cli.output import print_result
from fedloom.errors import MethodError
from fedloom.methods.traits import Law

BROKEN = 1


def audit(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="METHOD|MODULE:FUNCTION",
            help="A method that aggregates adapters, or a Python function: `mine:aggregate` is that of `mine.py` here.",
            show_default=False,
        ),
    ],
    unclaimed: Annotated[
        list[str] | None,
        typer.Option(
            "--unclaimed",
            metavar="LAW",
            help=f"A law that the function does not promise; may be repeated. One of {', '.join(Law)}.",
            show_default=False,
        ),
    ] = None,
    one_rank: Annotated[
        bool, typer.Option("--one-rank", help="The function is for clients of equal ranks only.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Show which laws of aggregation a method or a function of your own keeps, and by how much it misses the others.

    A function is imported and called: its code runs. The exit code is 1 if a claimed law is broken.
    """
    from fedloom.audit import battery
    from fedloom.audit.function import function_subject, importing_from
    from fedloom.audit.method import method_subject

    if ":" in subject:
        with importing_from(Path.cwd()):
            found = battery.audit(function_subject(subject, unclaimed or (), needs_one_rank=one_rank))
    elif unclaimed or one_rank:
        option = "--unclaimed" if unclaimed else "--one-rank"
        raise MethodError(f"{option}: expected with module:function only, got method {subject!r}; remove the option")
    else:
        found = battery.audit(method_subject(subject))
    print_result(found, as_json=as_json)
    return BROKEN if found.broken else 0
