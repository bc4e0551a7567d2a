"""serve, site, sites: training across institutions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.experiments import RUNS
from fedloom.cli.options import FreshOption, JsonOption, OutOption, SetOption
from fedloom.cli.output import print_json, print_line, print_result, say, say_folder

site_app = typer.Typer(help="Take part in studies as a site.", no_args_is_help=True)
sites_app = typer.Typer(help="Sites of a study, for its coordinator.", no_args_is_help=True)

StudyArgument = Annotated[
    Path, typer.Argument(metavar="STUDY", help="The file of a study: a recipe with [sites].", show_default=False)
]
SiteArgument = Annotated[Path, typer.Argument(metavar="SITE", help="The file of a site.", show_default=False)]


def serve(
    study: StudyArgument,
    overrides: SetOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a study across its sites. The same command again goes on after an interruption or a crash."""
    from fedloom.reporting.progress import progress_for
    from fedloom.sites.listening import check_listening, listening
    from fedloom.sites.serving import serve as serve_study
    from fedloom.sites.study import load_study

    loaded, folder = load_study(study, overrides or ()), out or RUNS / study.stem
    check_listening(loaded)
    with progress_for() as progress:
        result = serve_study(
            loaded, folder, lambda study, largest: listening(study, largest, say), fresh=fresh, progress=progress
        )
    print_result(result, as_json=as_json)
    say_folder("run", folder)


@site_app.command("run")
def site_run(site: SiteArgument) -> None:
    """Dial the server, wait for its studies and take part; ctrl-c leaves between tasks."""
    from fedloom.sites.site_run import run_site
    from fedloom.sites.site_settings import load_site

    run_site(load_site(site), say)


@site_app.command("check")
def site_check(site: SiteArgument, as_json: JsonOption = False) -> None:
    """Look at the kit, the base, and whether the study that is served now would be taken part in; train nothing."""
    from fedloom.sites.site_run import check_site
    from fedloom.sites.site_settings import load_site

    print_result(check_site(load_site(site), say), as_json=as_json)


@site_app.command("confirm")
def site_confirm(
    site: SiteArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to every study that waits, without a question.")] = False,
) -> None:
    """Agree to the studies that wait for a person's yes (policy.confirm)."""
    from fedloom.sites.members import read_members, shown
    from fedloom.sites.sheet import read_sheet
    from fedloom.sites.site_settings import load_site
    from fedloom.sites.store import confirm, unconfirmed

    folder = load_site(site).folder
    waiting = unconfirmed(folder)
    if not waiting:
        print_line("no study waits for a yes")
    for sheet_sha256, body in waiting:
        sheet = read_sheet(body)
        print_line(sheet.line)
        members = read_members(folder, sheet.run)
        if members is not None:
            print_line(shown(members))
        if yes or typer.confirm("Take part?", err=True):
            confirm(folder, sheet_sha256)
            print_line("agreed")


@site_app.command("log")
def site_log(site: SiteArgument, as_json: JsonOption = False) -> None:
    """Show what the site was asked, what it did, and what it refused and why."""
    from fedloom.sites.site_run import shown_entry
    from fedloom.sites.site_settings import load_site
    from fedloom.sites.store import Ledger

    entries = Ledger(load_site(site).folder).entries()
    if as_json:
        print_json(entries)
    for entry in () if as_json else entries:
        print_line(shown_entry(entry))


@sites_app.command("demo")
def sites_demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.", show_default=True)] = RUNS
    / "sites-demo",
    as_json: JsonOption = False,
) -> None:
    """Three sites and a server on this machine, one site killed and back; the adapter equals one process's."""
    from fedloom.sites.sites_demo import run_demo

    print_result(run_demo(out, say), as_json=as_json)
