"""aggregate: adapter folders of several sites merged into one, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import JsonOption, PushOption, RankOption
from fedloom.cli.output import print_result, say
from fedloom.errors import AdapterError


def aggregate(
    sites: Annotated[
        list[str],
        typer.Argument(
            metavar="SITE...", help="PEFT adapters: folders, hub names or finished runs.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="New or empty folder to write.", show_default=False)],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W1,W2,...",
            help="A weight for each, divided by their sum: for instance the sites' numbers of rows. Default: equal.",
            show_default=False,
        ),
    ] = None,
    rank: RankOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="NAME",
            help="The base of all, folder or hub name, where their files do not name one and the same.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    to_hub: PushOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge PEFT adapters of one base into one, exactly: the weighted mean of what each adds to the base.

    Ranks, scales and modules may differ. With --rank the error is stated, over all and by module.
    """
    from fedloom.results.push import check_name, push

    shares = None if weights is None else parse_weights(weights)
    if to_hub is not None:
        check_name(to_hub)
    from fedloom.results.aggregation import aggregate_adapters

    print_result(aggregate_adapters(sites, to, weights=shares, rank=rank, base=base, dtype=dtype), as_json=as_json)
    if to_hub is not None:
        say(f"uploaded to {push(to, to_hub)}")


def parse_weights(text: str) -> list[float]:
    """Read a list of weights.

    Raises:
        AdapterError: one of them is no number.
    """
    try:
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        raise AdapterError(f"--weights: expected numbers, got {text!r}; write them as in --weights 1,2,3") from None
