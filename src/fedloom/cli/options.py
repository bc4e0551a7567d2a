"""Arguments and options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.methods.table import BASELINE

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="[RECIPE]", help="A shipped recipe (`fedloom recipes`) or a TOML file."),
]
DEFAULT_RECIPE = "default"
"""What a command takes where no recipe is named."""
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.SETTING=VALUE",
        help="Override one setting; may be repeated. Nothing after `=` means its default.",
        show_default=False,
    ),
]
OwnSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[METHOD:]TABLE.SETTING=VALUE",
        help="Override one setting, for all methods or for the one named, whose own wins; may be repeated. Nothing "
        "after `=` means its default.",
        show_default=False,
    ),
]
GridOption = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="[METHOD:]TABLE.SETTING=V1,V2,...",
        help="Values to choose from for each method, or for the one named, by the loss on validation rows; may be "
        "repeated: all combinations are tried. Settings that go together are joined by /, names and values.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="METHOD",
        help=f"Method to compare the others with, over seeds. Default: {BASELINE}, if it is one of several.",
        show_default=False,
    ),
]
ComparisonOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder to write. Default: `runs/` and the recipe's name with `-compared`.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FOLDER", help="Folder to write. Default: `runs/` and the recipe's name.", show_default=False
    ),
]
RoundOption = Annotated[
    str | None,
    typer.Option(
        "--round",
        metavar="N|best",
        help="Use the model after this round of a run, where run.keep_states kept it; `best`: that of the lowest "
        "held-out loss. Default: the run's result.",
        show_default=False,
    ),
]
ToolOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TOOL",
        help="Check the rules of peft, vllm or gguf (llama.cpp), write what it takes, and say what it needs.",
        show_default=False,
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="OWNER/NAME",
        help="Also upload the folder to this repository of the hub; one that is not there is made, private.",
        show_default=False,
    ),
]
RankOption = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="N",
        help="Compress every module to this rank. Default: keep the adapter's ranks.",
        show_default=False,
    ),
]
