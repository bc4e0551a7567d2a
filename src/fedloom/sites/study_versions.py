"""The versions of a study that a run has been served with, in its folder, each with the round from which it held.

    study.json    {"versions": [{"version", "from_round", "names", "withdrawn", "settings_sha256", "signature"}, ...]}

The rounds before a version stay what they were: sites join at the end of the list, so that every number stays its
site's, and what a value per site was it remains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.run_folder.claim import is_begun
from fedloom.run_folder.contents import read_object
from fedloom.run_folder.manifest import read_manifest
from fedloom.run_folder.writer import RunFolder
from fedloom.sites.kit import read_kit
from fedloom.sites.members import is_signed
from fedloom.sites.study import VERSIONED, Study

VERSIONS = "study.json"


def check_version(study: Study, out: Path, fresh: bool) -> tuple[str, ...]:
    """Check that a study may be served into ``out``; return the settings that this version may change there.

    Raises:
        RunError: the version is not signed, older than the run's, or no continuation of it.
    """
    members = study.members
    if members.version > 1 and not is_signed(members, read_kit(study.sites.kit, "server").root):
        got = "the signature of something else" if members.signature else "none that can be read"
        raise RunError(
            f"expected a signature of the project's root for version {members.version} of the study (sites.version), "
            f"got {got}; run `fedloom sites sign` where the certificate authority is, and put what it writes beside "
            "the study"
        )
    known = [] if fresh or not is_begun(out) else versions_of(out)
    if not known or not (found := _difference(study, known[-1])):
        return VERSIONED if known and members.version > known[-1]["version"] else ()
    number = known[-1]["version"]
    raise RunError(
        f"{out}: expected version {number} of this run's study, or a later one that goes on from it, {found}, or "
        "choose another folder"
    )


def note_version(study: Study, folder: RunFolder) -> None:
    """Keep the version that holds from the next round on, where it is a new one."""
    there = (folder.path / VERSIONS).exists()
    known = folder.read_json(VERSIONS)["versions"] if there else []
    members = study.members
    if known and known[-1]["version"] == members.version:
        return
    settings = study.settings
    values = {"ranks": list(settings.client_ranks), "scales": list(settings.client_scales)}
    entry = {**members.model_dump(mode="json"), "from_round": (folder.last_round() or 0) + 1, **values}
    folder.write_json(VERSIONS, {"versions": [*known, entry]})


def versions_of(out: Path) -> list[dict[str, Any]]:
    """Return the versions that the run in ``out`` was served with, in order.

    Raises:
        RunError: the file is not what was written.
    """
    if not (out / VERSIONS).exists():
        return []
    found: list[dict[str, Any]] = read_object(out, read_manifest(out), VERSIONS)["versions"]
    return found


def _difference(study: Study, known: dict[str, Any]) -> str | None:
    """Say in what a study does not go on from the last version, and what to do; None where it does."""
    members, number, names = study.members, known["version"], tuple(known["names"])
    if members.version < number:
        return f"got version {members.version} (sites.version); serve the newest"
    same_sites = (members.names, sorted(members.withdrawn)) == (names, sorted(known["withdrawn"]))
    if study.settings.traits.is_cut and not same_sites:
        return f"got other sites (sites.names); a cut model keeps its sites: go on with {', '.join(names)}"
    if members.version == number and not same_sites:
        return (
            f"got other sites (sites.names, sites.withdrawn) under the same number; set sites.version = {number + 1} "
            "and sign it (fedloom sites sign)"
        )
    if members.names[: len(names)] != names:
        return (
            f"got sites.names = {list(members.names)}; keep {', '.join(names)} at its beginning, new sites behind "
            "them, and list who leaves in sites.withdrawn"
        )
    ranks, scales = study.settings.client_ranks, study.settings.client_scales
    for name, now, then in (("method.ranks", ranks, known["ranks"]), ("method.alpha", scales, known["scales"])):
        changed = [names[i] for i, value in enumerate(then) if now[i] != value]
        if changed:
            return f"got another {name} for {', '.join(changed)}; keep what earlier sites have"
    if max(ranks) > max(known["ranks"]) and not study.settings.traits.starts_fresh:
        return (
            f"got rank {max(ranks)} (method.ranks) for a site that joins; with {study.settings.method.name} give it at "
            f"most the largest rank of the others, {max(known['ranks'])}"
        )
    return None
