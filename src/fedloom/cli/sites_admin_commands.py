"""Certificates of a project: sites init, approve, list, revoke; site request, install."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.experiments import RUNS
from fedloom.cli.options import JsonOption, OutOption
from fedloom.cli.output import print_json, print_line, print_result, say

StudyOption = Annotated[
    Path, typer.Option("--study", metavar="STUDY", help="The file of the study.", show_default=True)
]
AuthorityOption = Annotated[
    Path | None,
    typer.Option("--ca", metavar="FOLDER", help="The certificate authority; default: `ca` beside the study."),
]
STUDY = Path("study.toml")


class Form(StrEnum):
    """What is printed to keep a role running."""

    SYSTEMD = "systemd"
    CONTAINER = "container"


FormOption = Annotated[Form, typer.Option("--form", help="What to print.", show_default=True)]


def sites_init(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The file of the study.", show_default=False)],
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="The server's name, as sites reach it.")],
    port: Annotated[int, typer.Option("--port", metavar="PORT", help="The server's port.", min=1, max=65535)] = 8002,
    project: Annotated[
        str | None, typer.Option("--project", metavar="NAME", help="Name of the project; default: the study's file.")
    ] = None,
    authority: AuthorityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a project's certificate authority and the server's kit, once."""
    from fedloom.sites.provisioning import begin
    from fedloom.sites.study import load_study

    loaded = load_study(study)
    print_result(begin(loaded, project or study.stem, host, port, _authority(study, authority)), as_json=as_json)


def sites_approve(
    asked: Annotated[Path, typer.Argument(metavar="REQUEST", help="A site's request.", show_default=False)],
    study: StudyOption = STUDY,
    authority: AuthorityOption = None,
) -> None:
    """Sign the request of a site that the study names."""
    from fedloom.sites.provisioning import approve
    from fedloom.sites.study import load_study

    signed = approve(asked, load_study(study), _authority(study, authority))
    print_line(str(signed))
    say("send it back to the site, and tell it the fingerprint by another way")


def sites_sign(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The file of the study.", show_default=False)],
    authority: AuthorityOption = None,
) -> None:
    """Sign a version of the study in which sites join or withdraw."""
    from fedloom.run_folder import durable
    from fedloom.sites.members import shown, with_signature
    from fedloom.sites.study import load_study, signed_file

    members, path = with_signature(load_study(study).members, _authority(study, authority)), signed_file(study)
    with durable.explained(str(path), "choose another folder for the study"):
        durable.write_bytes(path, members.model_dump_json().encode())
    say(shown(members))
    print_line(str(path))
    say("put it beside the study at the server, and serve again")


def sites_list(study: StudyOption = STUDY, authority: AuthorityOption = None, as_json: JsonOption = False) -> None:
    """Show the study's sites: approved, not yet, expired or revoked."""
    from fedloom.sites.provisioning import members
    from fedloom.sites.study import load_study

    found = members(load_study(study), _authority(study, authority))
    if as_json:
        print_json([dict(member.__dict__) for member in found])
    for member in () if as_json else found:
        until = f"  valid until {member.valid_until}" if member.valid_until else ""
        print_line(f"{member.name}  {member.state}{'  ' if member.organisation else ''}{member.organisation}{until}")


def sites_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site.", show_default=False)],
    study: StudyOption = STUDY,
    authority: AuthorityOption = None,
) -> None:
    """Turn a site away from now on, also while the study is served."""
    from fedloom.sites.provisioning import revoke
    from fedloom.sites.study import load_study

    revoke(name, load_study(study), _authority(study, authority))
    print_line(f"{name} is turned away from now on")


def site_request(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's name in the study.", show_default=False)],
    project: Annotated[str, typer.Option("--project", metavar="NAME", help="The project, as its coordinator says.")],
    organisation: Annotated[str, typer.Option("--org", metavar="NAME", help="Your organisation, without spaces.")],
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder for key and request; default: the name.")
    ] = None,
) -> None:
    """Make this site's key, which stays here, and a request for the coordinator."""
    from fedloom.sites.provisioning import request

    place = folder or Path(name)
    print_line(str(request(name, project, organisation, place)))
    say(f"send it to the coordinator; the key stays in {place}")


def site_install(
    signed: Annotated[Path, typer.Argument(metavar="SIGNED", help="What the coordinator sent.", show_default=False)],
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", metavar="SHA256:…", help="As the coordinator told it, by another way.")
    ],
    asked: Annotated[
        Path | None,
        typer.Option("--request", metavar="FOLDER", help="Folder of `site request`; default: the site's name."),
    ] = None,
    kit: Annotated[
        Path | None, typer.Option("--kit", metavar="FOLDER", help="Folder for the kit; default: kit/NAME.")
    ] = None,
) -> None:
    """Make this site's kit, in which nobody can start a job or a command."""
    from fedloom.sites.kit_check import check_kit
    from fedloom.sites.provisioning import install

    folder = install(signed, fingerprint, asked, kit)
    found = check_kit(folder, "client")
    say(f'installed; in site.toml: name = "{found.name}", server = "{found.address}", kit = "{folder}"')
    print_line(str(folder))
    say("to keep the site running: fedloom site service site.toml")


def site_service(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="The file of the site.", show_default=False)],
    form: FormOption = Form.SYSTEMD,
) -> None:
    """Print what keeps this site running: a systemd unit of this installation, or a container file."""
    from fedloom.sites.service_files import site_container, site_unit
    from fedloom.sites.site_settings import load_site

    name = load_site(site).site.name
    print_line(site_unit(site, name) if form is Form.SYSTEMD else site_container(site))


def sites_service(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The file of the study.", show_default=False)],
    out: OutOption = None,
    form: FormOption = Form.SYSTEMD,
) -> None:
    """Print what keeps the study's server running: a systemd unit of this installation, or a container file."""
    from fedloom.sites.kit_check import check_kit, is_flare_kit
    from fedloom.sites.service_files import server_container, server_unit
    from fedloom.sites.study import load_study

    sites = load_study(study).sites
    if form is Form.SYSTEMD:
        print_line(server_unit(study, out or RUNS / study.stem))
        return
    address = check_kit(sites.kit, "server").address if is_flare_kit(sites.kit, "server") else sites.address
    print_line(server_container(study, int(address.rpartition(":")[2])))


def add_commands(site: typer.Typer, sites: typer.Typer) -> None:
    """Add the commands to the groups of sites and of their coordinator."""
    site.command("request")(site_request)
    site.command("install")(site_install)
    site.command("service")(site_service)
    sites.command("init")(sites_init)
    sites.command("approve")(sites_approve)
    sites.command("sign")(sites_sign)
    sites.command("list")(sites_list)
    sites.command("revoke")(sites_revoke)
    sites.command("service")(sites_service)


def _authority(study: Path, given: Path | None) -> Path:
    return (given or study.parent / "ca").absolute()
