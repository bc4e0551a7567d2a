"""The commands together, and what an exit code means.

0 done; 1 an audit found a law broken; 2 the user's input, or what the operating system refused: one line per problem
after ``error:``; 130 interrupted, with the state saved. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fedloom import __version__
from fedloom.cli import (
    aggregating,
    auditing,
    diagnosing,
    experiments,
    explaining,
    leaking,
    result_commands,
    score_commands,
    settings_command,
    shipped,
    showing,
    sites,
    sites_admin_commands,
)
from fedloom.cli.output import output_explained, say, takes_all_output
from fedloom.errors import FedloomError

DONE, UNREAD, USER_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="fedloom",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def fedloom(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune large language models on data that stays where it is, with low-rank adapters."""


app.command("validate")(experiments.validate)
app.command("settings")(settings_command.settings)
app.command("describe")(experiments.describe)
app.command("run")(experiments.run)
app.command("compare")(experiments.compare)
app.command("serve")(sites.serve)
app.command("evaluate")(result_commands.evaluate)
app.command("generate")(result_commands.generate)
app.command("export")(result_commands.export)
app.command("aggregate")(aggregating.aggregate)
app.command("doctor")(diagnosing.doctor)
app.command("explain")(explaining.explain)
app.command("audit")(auditing.audit)
app.command("judge")(score_commands.judge)
app.command("leakage")(leaking.leakage)
app.add_typer(score_commands.app, name="score")
app.command("demo")(showing.demo)
app.command("report")(showing.report)
app.command("paper")(showing.paper)
app.add_typer(shipped.app, name="recipes")
sites_admin_commands.add_commands(sites.site_app, sites.sites_app)
app.add_typer(sites.site_app, name="site")
app.add_typer(sites.sites_app, name="sites")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(exit_code(list(sys.argv[1:] if arguments is None else arguments)))


def exit_code(arguments: list[str]) -> int:
    """Run one command and return its exit code; without a command, show the help."""
    # It speaks of a missing kernel wherever peft is imported, whatever the base; what is missing is said by doctor.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if sys.stderr is None:
        sys.stderr = io.StringIO()  # closed: there is nobody to tell anything
    if sys.stdout is None:
        return _refuse("standard output is closed: expected a place for the result; send it to a file or to /dev/null")
    try:
        # standalone_mode=False: typer would print its own errors and exit, with other words and another exit code.
        command = typer.main.get_command(app)
        returned = command(arguments or ["--help"], prog_name="fedloom", standalone_mode=False)
        with output_explained():
            sys.stdout.flush()
    except FedloomError as error:
        return _refuse(str(error))
    except typer.TyperException as error:
        return _refuse(f"{error.format_message().rstrip('.')}; see fedloom --help, or --help after the command")
    except OSError as error:
        if not takes_all_output() and isinstance(error, BrokenPipeError):
            return UNREAD
        return _refuse(_system_refusal(error))
    except (KeyboardInterrupt, typer.Abort):
        returned = INTERRUPTED
    if returned == INTERRUPTED:
        say("interrupted; completed work is saved, run the same command again to resume")
    return returned if isinstance(returned, int) else DONE


def _system_refusal(error: OSError) -> str:
    """Return one line about what the operating system refused, wherever that was."""
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if names:
        return (
            f"{' and '.join(names)}: expected a file or folder to use, got: {reason}; check its name, rights and space"
        )
    return f"the system refused: {reason}; mend that and run the same command again"


def _refuse(message: str) -> int:
    for line in message.split("\n"):
        say(f"error: {line}")
    return USER_INPUT
