"""explain: what a run's adapter is made of, what each round did to it, and whether the clients agreed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import JsonOption
from fedloom.cli.output import print_result, say


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.", show_default=False)],
    round: Annotated[
        int | None,
        typer.Option("--round", metavar="N", min=1, help="Round whose modules are shown. Default: the last one."),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(
            "--module",
            metavar="NAME",
            help="Show these modules only: a name, its last part (`q_proj`), or a pattern (`*.0.*`).",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with plots too.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show per module and round what a run did: ranks in use, change, noise, agreement of the clients, moments.

    Nothing is trained or changed, and no base is loaded.
    """
    from fedloom.explanation.explain import explain as explained
    from fedloom.reporting.page.document import beginning
    from fedloom.run_folder.durable import refuse_other_file

    if html is not None:
        refuse_other_file(html, beginning("fedloom explain"), "explanation", "choose another --html")
    found = explained(run, round=round, module=module)
    if html is not None:
        from fedloom.explanation.page import html_of
        from fedloom.reporting.page.document import write_page

        write_page(html_of(found), html)
        say(f"note: plots are in {html}")
    print_result(found, as_json=as_json)
