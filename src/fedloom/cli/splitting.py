"""leakage: how much of the clients' text a server could read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import JsonOption
from fedloom.cli.output import print_result, say
from fedloom.errors import SettingsError


def leakage(
    result: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    public: Annotated[
        str, typer.Option("--public", metavar="FILE", help="Public text or rows to train the attacker on.")
    ],
    cuts: Annotated[
        str | None, typer.Option("--cuts", metavar="1,2,...", help="Cuts to measure. Default: the run's own.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="SHAPE", help="Shape of the public rows, or `text`. Default: the run's."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of the attacker's training.")] = 600,
    base: Annotated[str | None, typer.Option("--base", metavar="FOLDER", help="The base model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an attacker on public text, and report how many private tokens it reads at a cut."""
    from fedloom.results import leaks, opened_result
    from fedloom.split.leakage import AttackSettings

    layers = None if cuts is None else parse_cuts(cuts)
    run = opened_result.find_result(result)
    leaks.check_run(run)
    opened = opened_result.over_base(run, base)

    def report(cut_layer: int, step: int, loss_nats: float) -> None:
        if step % 100 == 0:
            say(f"cut {cut_layer}: step {step} of {steps}, loss {loss_nats:.3f}")

    found = leaks.leakage(
        opened, public, cut_layers=layers, shape=shape, settings=AttackSettings(steps=steps), on_step=report
    )
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
