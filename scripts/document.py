"""Write docs/settings.md from the schema and docs/commands.md from the command line.

python scripts/document.py            # write both pages
python scripts/document.py --check    # exit 1 when a committed page differs from what would be written
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fedloom.cli import app
from fedloom.config import tables
from fedloom.config.setting import Table, described
from fedloom.sites.site_settings import site_tables
from fedloom.sites.study import SITES, Sites

DOCS = Path(__file__).resolve().parents[1] / "docs"

WIDTH = 119
NO_BREAK = "\x00"

SETTINGS_INTRODUCTION = """\
# Settings

Generated from the schema by `scripts/document.py`.

A recipe is a TOML file with the tables below. `--set table.setting=value` overrides one setting of it, and there is no
other way to override. The value is read as TOML (`3e-4`, `true`, `[8, 4, 4]`), or as text if it is not TOML
(`--set method.name=flora`); nothing after `=` means the default. A list per client has one entry for each client, by
number. Paths are relative to the folder the command runs in. Unknown names are rejected, and so is a setting that
would be ignored. If `--set method.name=...` names another method than the recipe, the settings that only the recipe's
method uses are ignored, and a list of ranks becomes its mean for a method of one rank, as in `fedloom compare`.
"""
STUDY_INTRODUCTION = """\
## The file of a study

What `fedloom serve` reads: a recipe without rows and without `[partition]`, and one more table.
"""
SITE_INTRODUCTION = """\
## The file of a site

What `fedloom site run` reads at a site. Nothing of it crosses.
"""
COMMANDS_INTRODUCTION = """\
# Commands

Generated from the command line by `scripts/document.py`.

Results go to standard output, progress and notes to standard error. Exit codes: 0 done; 1 an audit found a law
broken; 2 invalid input, with one line per problem; 130 interrupted, with the state saved.
"""


def settings_page() -> str:
    """Return docs/settings.md."""
    sections = (part for name, kind in tables().items() for part in table_section(name, kind))
    study = table_section(SITES, Sites, "###")
    site = (part for name, kind in site_tables().items() for part in table_section(name, kind, "###", "Site: "))
    return "\n".join([SETTINGS_INTRODUCTION, *sections, STUDY_INTRODUCTION, *study, SITE_INTRODUCTION, *site])


def table_section(name: str, kind: type[Table], level: str = "##", of: str = "") -> Iterator[str]:
    """Yield the section of one table."""
    yield f"{level} {of}[{name}]\n\n{kind.__doc__}\n"
    for key, field in kind.model_fields.items():
        yield item(described(f"{name}.{key}", field))
    yield ""


def item(text: str) -> str:
    """Return a list item wrapped to the width of a page, with every code span on one line.

    A table would need rows of any length; an item can be wrapped.
    """
    joined = re.sub(r"`[^`]*`", lambda span: span.group().replace(" ", NO_BREAK), text)
    lines = textwrap.wrap(
        joined, WIDTH, initial_indent="* ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(NO_BREAK, " ")


def commands_page() -> str:
    """Return docs/commands.md."""
    return "\n".join([COMMANDS_INTRODUCTION, *command_sections(typer.main.get_command(app), "fedloom")])


def command_sections(command: Any, path: str) -> Iterator[str]:
    """Yield the section of a command and of those below it."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    below = getattr(command, "commands", {})
    wanted = "[COMMAND]" if getattr(command, "invoke_without_command", False) else "COMMAND"
    usage = " ".join([path, *(argument.metavar for argument in arguments), wanted if below else "", "[OPTIONS]"])
    yield f"## {path}\n\n{command.help}\n\n```\n{' '.join(usage.split())}\n```\n"
    if command.params:
        for parameter in command.params:
            yield item(f"{spelling(parameter)}: {parameter.help or ''}{default_words(parameter)}")
        yield ""
    for name, child in below.items():
        yield from command_sections(child, f"{path} {name}")


def spelling(parameter: Any) -> str:
    """Return how an argument or option is typed."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return f"`{' / '.join([*parameter.opts, *parameter.secondary_opts])}{value}`"


def default_words(parameter: Any) -> str:
    """Return the default of an option that has one to show."""
    if parameter.param_type_name == "option" and parameter.required:
        return " Required."
    shown_kind = isinstance(parameter.default, str | int | float | Path) and not isinstance(parameter.default, bool)
    return f" Default: `{parameter.default}`." if shown_kind and parameter.default != "" else ""


def main(arguments: list[str]) -> int:
    """Write or check both pages."""
    pages = {DOCS / "settings.md": settings_page(), DOCS / "commands.md": commands_page()}
    stale = [file for file, text in pages.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for file in stale:
            print(f"{file.name} is not what the code says; run: python scripts/document.py", file=sys.stderr)
        return 1 if stale else 0
    for file in stale:
        file.write_text(pages[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
