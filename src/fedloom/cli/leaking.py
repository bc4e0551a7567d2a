"""leakage: how much of the clients' text a server, or whoever has the adapter, could read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import JsonOption
from fedloom.cli.output import print_result, say
from fedloom.errors import SettingsError

if TYPE_CHECKING:
    from fedloom.results.opened_result import Found, OpenedResult
    from fedloom.results.round_leaks import MeterSettings


def leakage(
    results: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders: one of a cut model, or any of rounds.")
    ],
    public: Annotated[
        str | None,
        typer.Option(
            "--public",
            metavar="FILE",
            help="Public text or rows: what the attacker of a cut learns from; of rounds, what text has in common.",
            show_default=False,
        ),
    ] = None,
    cuts: Annotated[
        str | None,
        typer.Option("--cuts", metavar="1,2,...", help="Measure activations at these cuts. Default: a cut run's own."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="SHAPE", help="Shape of the public rows, or `text`. Default: the run's."),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Steps of the training of a cut's attacker.")
    ] = 600,
    round: Annotated[
        int | None,
        typer.Option("--round", metavar="N", min=1, help="Round whose updates are attacked. Default: the last kept."),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=1, help="Rows of a client to tell apart, read and others each.")
    ] = 200,
    candidates: Annotated[
        int, typer.Option("--candidates", metavar="N", min=1, help="Sequences that canaries are compared with.")
    ] = 1023,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with the table and a plot too.", show_default=False),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="FOLDER", help="The base model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Report what an attacker reads: of a cut's activations, or of what rounds send and release.

    At a cut an attacker is trained on public text, and reads private tokens. Of rounds: whether a row was trained on,
    which tokens an update was made from, and how far canaries are exposed, with ε and the held-out loss; several runs
    make one table.
    """
    from fedloom.results import leaks
    from fedloom.results.opened_result import find_result, over_base
    from fedloom.results.round_leaks import MeterSettings

    layers, found = None if cuts is None else parse_cuts(cuts), [find_result(path) for path in results]
    for one in found:
        leaks.check_run(one)
    of_cut = found[0].settings is not None and found[0].settings.traits.is_cut
    if layers is not None or of_cut:
        if len(results) > 1 or html is not None or public is None:
            raise SettingsError(
                "leakage at a cut: expected one run, --public and no --html, got another choice; give one run and "
                "public text to train the attacker on"
            )
        _at_cuts(over_base(found[0], base), public, layers, shape, steps, as_json)
        return
    _of_rounds(found, MeterSettings(round, rows, candidates, public, shape), base, html, as_json)


def _at_cuts(
    opened: OpenedResult, public: str, layers: tuple[int, ...] | None, shape: str | None, steps: int, as_json: bool
) -> None:
    from fedloom.results import leaks
    from fedloom.split.leakage import AttackSettings

    def report(cut_layer: int, step: int, loss_nats: float) -> None:
        if step % 100 == 0:
            say(f"cut {cut_layer}: step {step} of {steps}, loss {loss_nats:.3f}")

    found = leaks.leakage(
        opened, public, cut_layers=layers, shape=shape, settings=AttackSettings(steps=steps), on_step=report
    )
    print_result(found, as_json=as_json)


def _of_rounds(
    results: list[Found], settings: MeterSettings, base: str | None, html: Path | None, as_json: bool
) -> None:
    from fedloom.reporting.page.document import beginning, write_page
    from fedloom.results.leak_table import TITLE, html_of
    from fedloom.results.opened_result import over_base
    from fedloom.results.round_leaks import RoundLeakages, noted, round_leakage
    from fedloom.run_folder.durable import refuse_other_file

    if html is not None:
        refuse_other_file(html, beginning(TITLE), "page of leakage", "choose another --html")
    runs = [round_leakage(over_base(one, base), settings, say) for one in results]
    found = RoundLeakages(tuple(runs), noted(runs))
    if html is not None:
        write_page(html_of(found), html)
        say(f"note: the plot is in {html}")
    print_result(found, as_json=as_json)


def parse_cuts(text: str) -> tuple[int, ...]:
    """Read a list of cuts.

    Raises:
        SettingsError: one of them is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(
            f"--cuts: expected integers separated by commas, got {text!r}; write them as in --cuts 1,2,3"
        ) from None
