"""The server's end of the link that a study's kit is made for: FLARE's, or with certificates alone gRPC."""

from __future__ import annotations

from collections.abc import Callable

from fedloom.sites.flare_link import FlareServerLink, required_flare
from fedloom.sites.grpc_link import GrpcServerLink, check_free, required_grpc
from fedloom.sites.kit import read_kit
from fedloom.sites.kit_check import check_kit, is_flare_kit
from fedloom.sites.link import Link
from fedloom.sites.study import Study


def check_listening(study: Study) -> None:
    """Check, before a base is loaded, that the server could listen.

    Raises:
        RunError: the kit does not fit, or the port is taken.
        MissingExtraError: what the kit is made for is not installed.
    """
    address = study.sites.address
    read_kit(study.sites.kit, "server")
    if is_flare_kit(study.sites.kit, "server"):
        required_flare()
        address = check_kit(study.sites.kit, "server").address
    else:
        required_grpc()
    check_free(address)


def listening(study: Study, largest_frame: int, note: Callable[[str], None]) -> Link:
    """Listen for the sites of a study that have not withdrawn.

    Raises:
        RunError: the kit does not fit, or the port is taken.
        MissingExtraError: what the kit is made for is not installed.
    """
    kit, present = read_kit(study.sites.kit, "server"), study.sites.present
    if is_flare_kit(study.sites.kit, "server"):
        flare = check_kit(study.sites.kit, "server")
        note(f"starting FLARE's server at {flare.address} for {', '.join(present)}")
        return FlareServerLink(flare, present, largest_frame, note)
    note(f"listening at {study.sites.address} for {', '.join(present)}")
    return GrpcServerLink(study.sites.address, kit, present, largest_frame)
